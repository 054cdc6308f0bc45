#!/bin/sh
# Install what the test cluster needs besides Weir's own dependencies: containerd, runc, etcd, CNI plugins, iptables.
# Go (1.21 or newer; it fetches the toolchain the modules ask for) is not installed by this.
set -eu
need=""
for pair in containerd:containerd runc:runc etcd-server:etcd iptables:iptables conntrack:conntrack iproute2:ip openssl:openssl; do
	command -v "${pair#*:}" >/dev/null 2>&1 || [ -x "/usr/sbin/${pair#*:}" ] || need="$need ${pair%:*}"
done
[ -x /usr/lib/cni/bridge ] || need="$need containernetworking-plugins"
if [ -n "$need" ]; then
	[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || { echo "deps: as root: apt-get install$need" >&2; exit 1; }
	echo "deps: installing Debian packages:$need"
	export DEBIAN_FRONTEND=noninteractive
	apt-get update -qq
	# shellcheck disable=SC2086 # a list of words
	apt-get install -y -qq --no-install-recommends $need >/dev/null
	echo "deps: Debian starts containerd and etcd as services; the cluster runs its own:"
	echo "deps: systemctl disable --now containerd etcd"
fi
command -v go >/dev/null || { echo "deps: no Go in PATH: https://go.dev/dl, or a package of your distribution" >&2; exit 1; }
