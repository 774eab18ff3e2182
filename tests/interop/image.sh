#!/usr/bin/env bash
# image.sh FOLDER: makes FOLDER/vmlinuz and FOLDER/initrd.cpio, a small Linux whose kernel has an NVMe/TCP initiator.
# All of it comes from Debian packages, which are unpacked and never installed; needs root, apt and its lists.
# A second call with nothing changed returns at once.
set -euo pipefail
cache=$1
cd "$(dirname "${BASH_SOURCE[0]}")"
kernel=linux-image-6.12-cloud-amd64
packages=(busybox-static bash nvme-cli fio e2fsprogs util-linux kmod libgcc-s1)
programs=(busybox bash nvme fio mke2fs e2fsck kmod blkdiscard blockdev)
# Loaded by init in this order, with what they depend on; what is built in is passed over.
modules=(virtio_pci virtio_net virtio-rng virtio_console crc32c_intel crc32c ext4 nvme-core nvme-fabrics nvme-tcp)

mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9
stamp=$(cat image.sh guest/init guest/host | sha256sum)
[ "$(cat "$cache/stamp" 2>/dev/null)" != "$stamp" ] || exit 0
rm -f "$cache/stamp"

work=$(mktemp -d "$cache/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{debs/partial,root,image}
# With an empty status file apt resolves the packages as for a bare system.
: >"$work/status"
apt-get -qq -y -o Dir::State::status="$work/status" -o Dir::Cache::archives="$work/debs" \
  -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= -o Debug::NoLocking=1 -o APT::Sandbox::User=root \
  --no-install-recommends --download-only install "${packages[@]}" "$kernel" >&2
printf '%s\0' "$work"/debs/*.deb | xargs -0 -n1 -I{} dpkg-deb -x {} "$work/root"
root=$work/root image=$work/image
version=$(ls "$root/lib/modules")

# The programs with the libraries that they are linked to, where Debian has them.
mkdir -p "$image"/{proc,sys,dev,tmp,run,root,mnt,job,etc/nvme,bin,sbin,usr/bin,usr/sbin}
paths=()
for program in "${programs[@]}"; do
  for folder in usr/sbin usr/bin sbin bin; do
    [ -e "$root/$folder/$program" ] && paths+=("/$folder/$program") && continue 2
  done
  echo "image.sh: no program $program in the packages" >&2
  exit 1
done
libraries=$(for path in "${paths[@]}" /lib/x86_64-linux-gnu/libgcc_s.so.1; do
  chroot "$root" /lib64/ld-linux-x86-64.so.2 --list "$path" 2>/dev/null | grep -o '/[^ ]*' || true
  echo "$path"
done | sort -u)
tar -C "$root" -ch --hard-dereference $(sed 's,^/,,' <<<"$libraries") etc/mke2fs.conf lib64/ld-linux-x86-64.so.2 |
  tar -C "$image" -x
for name in modprobe depmod; do
  ln -sf "$(chroot "$image" /bin/busybox which kmod)" "$image/sbin/$name"
done
ln -sf "$(cd "$image" && ls -d /sbin/mke2fs)" "$image/sbin/mkfs.ext4"
for name in $(chroot "$image" /bin/busybox --list); do
  chroot "$image" /bin/busybox which "$name" >/dev/null || ln -sf /bin/busybox "$image/bin/$name"
done
ln -sf bash "$image/bin/sh"

# The modules with what they depend on, unpacked.
chroot "$root" /sbin/depmod "$version"
for module in "${modules[@]}"; do
  chroot "$root" /sbin/modprobe -S "$version" --show-depends "$module"
done | sed -n 's/^insmod \([^ ]*\).*/\1/p' | sort -u | sed 's,^/,,' | tar -C "$root" -c -T- | tar -C "$image" -x
find "$image/lib/modules" -name '*.ko.xz' -exec xz -d {} +
cp "$root/lib/modules/$version"/modules.{builtin,order} "$image/lib/modules/$version/"
chroot "$image" /sbin/depmod "$version"
printf '%s\n' "${modules[@]}" >"$image/etc/boot-modules"

install -m755 guest/init "$image/init"
install -m755 guest/host "$image/bin/host"
echo root:x:0:0:root:/root:/bin/sh >"$image/etc/passwd"
echo root:x:0: >"$image/etc/group"
echo '127.0.0.1 localhost' >"$image/etc/hosts"
ln -s /proc/self/mounts "$image/etc/mtab"
(cd "$image" && find . -print0 | cpio --quiet -0 -H newc -R 0:0 -o) >"$work/initrd.cpio"
mv "$work/initrd.cpio" "$cache/initrd.cpio"
cp "$root/boot/vmlinuz-$version" "$cache/vmlinuz"
echo "$stamp" >"$cache/stamp"
