#!/bin/sh
# usage: confine.sh EMPTY-FOLDER PATHS COMMAND...
# Become the command as a restricted pod runs it: a root that can't be written to, no /tmp, a
# numeric user, no capabilities and none to be had, no standard input. PATHS (one a line) are what
# it needs of this machine. To be run in a mount namespace of its own.
set -eu
PATH=$PATH:/usr/sbin:/sbin
root=$1 paths=$2
shift 2
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs "$root"
printf '%s\n' /usr /etc /proc "$paths" | while read -r path; do
	mkdir -p "$root$path"
	mount --rbind "$path" "$root$path"
	[ "$path" = /proc ] || mount -o remount,ro,bind "$root$path"
done
for path in /bin /lib /lib64; do
	[ ! -L "$path" ] || cp -P "$path" "$root$path"
done
mount -o remount,ro "$root"
exec chroot "$root" setpriv --reuid=65532 --regid=65532 --clear-groups --bounding-set=-all \
	--inh-caps=-all --no-new-privs -- "$@" <&-
