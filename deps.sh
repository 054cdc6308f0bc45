#!/bin/sh
# Install what a fresh Debian or Ubuntu machine lacks. usage: deps.sh PYTHON VENV [bench|machine]
# With `bench`, what the benchmarks drive and are compared with, too; with `machine`, what boots other kernels.
# Debian packages need root; without it this says what is missing and goes on with what is there.
set -eu
python=$1 venv=$2
say() { printf 'deps: %s\n' "$*"; }

need=""
want() { # want PACKAGE PATH-OR-COMMAND...: the package is there if any of them is
	package=$1; shift
	for it; do
		case $it in
		/*) [ -e "$it" ] && return ;;
		*) command -v "$it" >/dev/null 2>&1 && return ;;
		esac
	done
	need="$need $package"
}
triplet=$(uname -m)-linux-gnu
want clang clang; want llvm llvm-strip; want clang-format clang-format
want libbpf1 "/usr/lib/$triplet/libbpf.so.1" /usr/lib64/libbpf.so.1
want libbpf-dev /usr/include/bpf/bpf_helpers.h
want musl-tools musl-gcc
want linux-libc-dev /usr/include/linux/bpf.h
want bpftool bpftool /usr/sbin/bpftool; want iproute2 ip /usr/sbin/ip
want mosquitto mosquitto /usr/sbin/mosquitto
want python3-bpfcc /usr/lib/python3/dist-packages/bcc # 5 MB beside clang: the loader that compiles here
want gcc gcc; want libc6-dev /usr/include/stdio.h # what mypyc's C is compiled with (docs/decisions/036)
want openssl openssl; want curl curl # what the tests of TLS make certificates with, and a client of it
[ "${3:-}" = bench ] && {
	want wrk wrk; want nginx-light nginx /usr/sbin/nginx; want nghttp2-client h2load; }
[ "${3:-}" = machine ] && {
	want qemu-system-x86 qemu-system-x86_64; want kmod depmod /usr/sbin/depmod
	want runsc runsc # gVisor, which the agent must recognise
	want apparmor apparmor_parser /usr/sbin/apparmor_parser; want checkpolicy checkpolicy # policies to try
	want debian-archive-keyring /usr/share/keyrings/debian-archive-keyring.gpg; }
"$python" -c 'import venv, ensurepip' 2>/dev/null || need="$need python3-venv"
"$python" -c 'import os, sys, sysconfig as s; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' ||
	need="$need python3-dev"

if [ -n "$need" ]; then
	if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
		say "installing Debian packages:$need"
		export DEBIAN_FRONTEND=noninteractive
		apt-get update -qq
		# one by one: a package this release lacks must not keep the others away
		for package in $need; do
			apt-get install -y -qq --no-install-recommends "$package" >/dev/null ||
				say "could not install $package; what needs it will say so"
		done
		case " $need " in *" mosquitto "* | *" nginx-light "*)
			say "Debian starts mosquitto (1883, loopback) and nginx (80) as services; Weir does not use those:"
			say "systemctl disable --now mosquitto nginx" ;;
		esac
	else
		say "missing, and only root can install them:$need"
		say "run: sudo apt-get install$need"
		case " $need " in *" python3-venv "*) exit 1 ;; esac
	fi
fi

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
	say "$("$python" --version) is too old: Weir needs Python 3.11 or newer (make deps PYTHON=python3.12)"; exit 1; }
[ -x "$venv/bin/python" ] || { say "creating $venv"; "$python" -m venv "$venv"; }
say "installing the locked Python packages (requirements.lock) into $venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
say "done"
