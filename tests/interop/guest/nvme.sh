#!/bin/bash
# Every check of the NVMe/TCP target through Linux's own initiator and nvme-cli, within the guest.
# Usage: nvme.sh ADDRESS DISCOVERY-PORT NQN-512 NQN-4096 PORT...   (the ports of the targets, in their order)
# Prints "ok NAME" for each check; the first that fails ends it, with what was seen.
set -uo pipefail
address=$1 discovery=$2 nqn=$3 nqn4k=$4
shift 4
ports=("$@")
id=4f1b2c3d-0000-4000-8000-00000000abcd
hostnqn=nqn.2014-08.org.nvmexpress:uuid:$id
mkdir -p /etc/nvme
echo "$hostnqn" >/etc/nvme/hostnqn
echo "$id" >/etc/nvme/hostid

fail() {
  echo "FAILED: $*"
  dmesg | tail -40
  exit 1
}
ok() { echo "ok $*"; }
# within SECONDS COMMAND...: repeats it until it succeeds.
within() {
  local until=$((SECONDS + $1))
  shift
  until "$@"; do
    [ $SECONDS -lt $until ] || return 1
    sleep .2
  done
}
connect() { # PORT NQN OPTION...
  local port=$1 name=$2
  shift 2
  nvme connect -t tcp -a "$address" -s "$port" -n "$name" --reconnect-delay=1 --ctrl-loss-tmo=120 "$@" 2>&1 ||
    fail "connect $port $name $*"
}
disconnect() { nvme disconnect -n "$1" >/dev/null || fail "disconnect $1"; }
# The block device of a subsystem, once it is there.
disk_of() { # NQN
  local subsystem head
  for subsystem in /sys/class/nvme-subsystem/nvme-subsys*; do
    [ "$(cat "$subsystem/subsysnqn" 2>/dev/null)" = "$1" ] || continue
    for head in "$subsystem"/nvme*n1; do
      head=${head##*/}
      [[ $head =~ ^nvme[0-9]+n1$ && -b /dev/$head ]] && echo "/dev/$head" && return
    done
  done
  return 1
}
disk() { within 20 disk_of "$1" >/dev/null && disk_of "$1" || fail "no disk of $1"; }
paths_live() { # NQN COUNT
  local subsystem state live=0
  for subsystem in /sys/class/nvme-subsystem/nvme-subsys*; do
    [ "$(cat "$subsystem/subsysnqn" 2>/dev/null)" = "$1" ] || continue
    for state in "$subsystem"/nvme*/state; do
      [ "$(cat "$state" 2>/dev/null)" = live ] && live=$((live + 1))
    done
  done
  [ $live -eq "$2" ]
}
verify() { # DISK OPTION...
  local disk=$1
  shift
  fio --name=verify --filename="$disk" --direct=1 --ioengine=libaio --verify=crc32c --verify_fatal=1 \
    --verify_state_save=0 --exitall_on_error=1 --output=/tmp/fio "$@" || { cat /tmp/fio; fail "fio $*"; }
}
same() { # FILE OFFSET FILE OFFSET BYTES
  cmp -s <(dd if="$1" bs=512 skip=$(($2 / 512)) count=$(($5 / 512)) status=none) \
    <(dd if="$3" bs=512 skip=$(($4 / 512)) count=$(($5 / 512)) status=none)
}
is_zero() { # DISK OFFSET-BYTES BYTES
  same "$1" "$2" /dev/zero 0 "$3"
}
fill() { # DISK OFFSET-MIB MIB
  dd if=/tmp/pattern of="$1" bs=1M seek="$2" count="$3" oflag=direct status=none || fail "dd to $1"
  blockdev --flushbufs "$1"
}
field() { sed -n "s/^$2 *: *//p" <<<"$1" | head -1; }

# --- discovery
seen=$(nvme discover -t tcp -a "$address" -s "$discovery") || fail "discover: $seen"
for name in "$nqn" "$nqn4k"; do
  [ "$(grep -c "subnqn: *$name$" <<<"$seen")" -eq ${#ports[@]} ] || fail "not every port of $name: $seen"
done
for port in "${ports[@]}"; do
  grep -q "trsvcid: *$port\$" <<<"$seen" || fail "no port $port: $seen"
  nvme discover -t tcp -a "$address" -s "$port" | grep -q "$nqn" || fail "no discovery on port $port"
done
ok "discover: both volumes at each of ${#ports[@]} ports, from the discovery port and from every port"

# --- connect, with each number of queues and each set of digests
for queues in 1 2; do
  for digests in "" "--hdr-digest" "--data-digest" "--hdr-digest --data-digest"; do
    connect "${ports[0]}" "$nqn" --nr-io-queues=$queues $digests
    disk=$(disk "$nqn")
    verify "$disk" --rw=randwrite --bs=4k --iodepth=8 --size=512k
    disconnect "$nqn"
    ok "connect: $queues IO queues, digests: ${digests:-none}"
  done
done

for digest in "" "--data-digest"; do
  connect "${ports[0]}" "$nqn" --nr-io-queues=1 --disable-sqflow $digest
  disk=$(disk "$nqn")
  verify "$disk" --rw=randrw --bs=4k --iodepth=8 --size=512k
  disconnect "$nqn"
done
ok "connect: without flow control of the submission queue, so that data says that a read succeeded"

# --- what the controller and the namespace say of themselves
connect "${ports[0]}" "$nqn" --nr-io-queues=2
disk=$(disk "$nqn")
controller=/dev/$(basename "$(ls -d /sys/class/nvme-subsystem/nvme-subsys*/nvme[0-9] | head -1)")
seen=$(nvme id-ctrl "$controller") || fail "id-ctrl"
[ "$(field "$seen" mdts)" = 8 ] && [ "$(field "$seen" subnqn)" = "$nqn" ] || fail "id-ctrl: $seen"
[ "$(cat /sys/block/"${disk##*/}"/queue/max_hw_sectors_kb)" -le 1024 ] || fail "requests above MDTS"
ok "id-ctrl"
seen=$(nvme id-ns "$disk") || fail "id-ns"
grep -q 'lbads:9 .*in use' <<<"$seen" || fail "id-ns: $seen"
[ "$(field "$seen" nguid)" != 00000000000000000000000000000000 ] || fail "id-ns: $seen"
ok "id-ns"
nvme ns-descs "$disk" | grep -q uuid || fail ns-descs
nvme list-ns "$controller" | grep -q ':0x1$' || fail list-ns
ok "ns-descs, list-ns"
for form in "5 1" "6 0" "7 0" "8 1"; do
  set -- $form
  nvme admin-passthru "$controller" -o 6 -n "$2" -r -l 4096 --cdw10="$1" >/tmp/seen 2>&1 || fail "Identify $1: $(cat /tmp/seen)"
done
ok "Identify by command set (CNS 5 to 7) and independent of it (CNS 8)"
nvme list | grep -q "$disk .*Ashlar" || fail "list: $(nvme list)"
nvme list-subsys | grep -q "$nqn" || fail list-subsys
ok "list, list-subsys"
seen=$(nvme smart-log "$controller") && grep -q '^critical_warning[[:space:]]*: 0' <<<"$seen" || fail "smart-log: $seen"
grep -qi '^host_write_commands[[:space:]]*: *[1-9]' <<<"$seen" || fail "smart-log counts no writes: $seen"
ok "smart-log, with what was written before"
for log in "error-log $controller" "fw-log $controller" "effects-log $controller" "ana-log $controller" \
  "changed-ns-list-log $controller" "supported-log-pages $controller"; do
  nvme $log >/tmp/seen 2>&1 || fail "$log: $(cat /tmp/seen)"
done
ok "error-log, fw-log, effects-log, ana-log, changed-ns-list-log, supported-log-pages"
for feature in 7 0xb 0xf; do
  nvme get-feature "$controller" -f $feature >/dev/null || fail "get-feature $feature"
done
ok "get-feature: queues, async events, keep alive"
host ls "$hostnqn" || fail "export ls"
ok "export ls shows this host, its queues and digests"

# --- data of every size at every depth
for job in "512 1 128k" "512 128 256k" "4k 1 1M" "4k 128 8M" "64k 32 16M" "1M 1 8M" "1M 16 16M"; do
  set -- $job
  verify "$disk" --rw=randwrite --bs="$1" --iodepth="$2" --size="$3"
  ok "fio verify: blocks of $1 at depth $2"
done
verify "$disk" --rw=write --bsrange=512-1M --bs_unaligned=0 --iodepth=64 --size=16M
ok "fio verify: blocks of 512 B to 1 MiB at depth 64"
verify "$disk" --rw=randwrite --bs=4k --iodepth=16 --numjobs=2 --offset_increment=8M --size=4M
ok "fio verify: two jobs, two queues"

# --- commands beside read and write
head -c 4194304 /dev/urandom >/tmp/pattern
fill "$disk" 0 4
same "$disk" 0 /tmp/pattern 0 4194304 || fail "what was written is not there"
nvme compare "$disk" -s 0 -c 7 -z 4096 -d /tmp/pattern >/dev/null || fail compare
! nvme compare "$disk" -s 8 -c 7 -z 4096 -d /tmp/pattern >/dev/null 2>&1 || fail "compare of other data succeeds"
nvme verify "$disk" -s 0 -c 255 >/dev/null || fail verify
nvme flush "$disk" >/dev/null || fail flush
ok "compare, verify, flush"
blkdiscard -o 1048576 -l 1048576 "$disk" || fail blkdiscard
blockdev --flushbufs "$disk"
is_zero "$disk" 1048576 1048576 || fail "what was discarded does not read as zeroes"
same "$disk" 0 /tmp/pattern 0 1048576 || fail "blkdiscard hit its neighbour"
nvme dsm "$disk" -d -s 4096 -b 2048 >/dev/null || fail dsm
blockdev --flushbufs "$disk"
is_zero "$disk" 2097152 1048576 || fail "what was deallocated does not read as zeroes"
same "$disk" 3145728 /tmp/pattern 3145728 1048576 || fail "dsm hit its neighbour"
ok "blkdiscard, dsm"
fill "$disk" 0 4
blkdiscard -z -o 512 -l 1048064 "$disk" || fail "blkdiscard -z"
nvme write-zeroes "$disk" -s 4096 -c 255 -d >/dev/null || fail write-zeroes
blockdev --flushbufs "$disk"
is_zero "$disk" 512 1048064 && same "$disk" 0 /tmp/pattern 0 512 || fail "write zeroes from an odd block on"
is_zero "$disk" 2097152 131072 && same "$disk" 1048576 /tmp/pattern 1048576 1048576 || fail "write zeroes, deallocated"
ok "write zeroes, with and without deallocation"
! nvme read "$disk" -s $(($(blockdev --getsz "$disk"))) -c 0 -z 512 >/tmp/seen 2>&1 || fail "a read past the end works"
grep -qi 'LBA out of range\|LBA_RANGE\|0x4080\|(0x80)' /tmp/seen || fail "a read past the end: $(cat /tmp/seen)"
ok "a read past the end is refused"

# --- a volume that grows
before=$(blockdev --getsize64 "$disk")
host resize 288M || fail "resize"
grown() { [ "$(blockdev --getsize64 "$disk")" -eq $((288 << 20)) ]; }
within 20 grown || fail "the disk has $(blockdev --getsize64 "$disk") bytes still, of before $before"
verify "$disk" --rw=randwrite --bs=64k --iodepth=8 --offset=$before --size=4M
ok "volume resize is seen by its async event, and the new end holds data"
disconnect "$nqn"

# --- a file system, on the volume of 4 KiB blocks
connect "${ports[1]}" "$nqn4k" --nr-io-queues=2 --hdr-digest --data-digest
disk4k=$(disk "$nqn4k")
nvme id-ns "$disk4k" | grep -q 'lbads:12 .*in use' || fail "the block size of $nqn4k"
mkfs.ext4 -q "$disk4k" || fail mkfs.ext4
mount -t ext4 -o discard "$disk4k" /mnt || fail mount
mkdir /mnt/files
for file in $(seq 60); do head -c $((file * 1777)) /tmp/pattern >/mnt/files/$file; done
cp /tmp/pattern /mnt/large
rm /mnt/files/?
(cd /mnt && sha256sum large files/* >/tmp/sums)
umount /mnt
disconnect "$nqn4k"
connect "${ports[2]}" "$nqn4k" --nr-io-queues=1
disk4k=$(disk "$nqn4k")
e2fsck -fn "$disk4k" >/tmp/seen 2>&1 || fail "fsck: $(cat /tmp/seen)"
mount -t ext4 "$disk4k" /mnt && (cd /mnt && sha256sum -c /tmp/sums >/dev/null) || fail "files differ at another target"
umount /mnt
disconnect "$nqn4k"
ok "mkfs.ext4, files, fsck, and the same files through another target"

# --- a host that falls silent
connect "${ports[0]}" "$nqn" --nr-io-queues=1 --keep-alive-tmo=5
disk=$(disk "$nqn")
host freeze "$hostnqn" || fail "the target did not let a silent host go"
within 30 paths_live "$nqn" 1 || fail "not connected again after the keep alive timer expired"
verify "$disk" --rw=randwrite --bs=4k --iodepth=4 --size=512k
disconnect "$nqn"
ok "keep alive: a silent host is let go, and comes back"

# --- what the packaged udev rule sets
connect "${ports[0]}" "$nqn"
disk=$(disk "$nqn")
# Without -r, so that a line which ends with a backslash goes on.
while read rule; do
  [[ $rule =~ ^ACTION.*SUBSYSTEM==\"([^\"]*)\" ]] || continue
  subsystem=${BASH_REMATCH[1]}
  while [[ $rule =~ ATTR\{([a-z_]*)\}=\"([^\"]*)\" ]]; do
    attribute=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]} rule=${rule#*"${BASH_REMATCH[0]}"}
    for place in /sys/class/"$subsystem"/nvme*; do
      echo "$value" >"$place/$attribute" || fail "$place/$attribute does not take $value"
      seen=$(cat "$place/$attribute")
      [ "$seen" = "$value" ] || [ "$value$seen" = -1off ] || fail "$place/$attribute is $seen, not $value"
    done
  done
done <71-ashlar-nvme.rules
[ "$(cat /sys/class/nvme-subsystem/nvme-subsys*/iopolicy)" = round-robin ] || fail "no IO policy was set"
disconnect "$nqn"
ok "the attributes that the udev rule sets are there, and take its values"

# --- hosts that may not
host allow nqn.2014-08.org.nvmexpress:uuid:somebody-else || fail "allow"
refused() { ! nvme connect -t tcp -a "$address" -s "${ports[0]}" -n "$nqn" >/tmp/seen 2>&1 || { disconnect "$nqn"; false; }; }
within 10 refused || fail "a host that is not on the list connects"
hidden() { ! nvme discover -t tcp -a "$address" -s "$discovery" | grep -q "$nqn"; }
within 10 hidden || fail "a host that is not on the list sees the volume"
host allow "$hostnqn" || fail "allow"
shown() { nvme discover -t tcp -a "$address" -s "$discovery" | grep -q "$nqn"; }
within 10 shown || fail "a host on the list does not see the volume"
connect "${ports[0]}" "$nqn"
disk=$(disk "$nqn")
ok "allow-list: strangers neither see nor reach the volume"

# --- a volume that another host takes over
fill "$disk" 0 1
host attach nqn.2014-08.org.nvmexpress:uuid:somebody-else || fail "attach by another host"
conflict() { # COMMAND...: it fails as one without a reservation does, by the kernel's EBADE or by its status
  ! "$@" >/tmp/seen 2>&1 || fail "a host that was taken over goes on: $*"
  grep -qi 'Invalid exchange\|reservation conflict' /tmp/seen || fail "$*: $(cat /tmp/seen)"
}
conflict dd if=/dev/zero of="$disk" bs=4k count=1 oflag=direct
conflict dd if="$disk" of=/dev/null bs=4k count=1 iflag=direct
conflict nvme write "$disk" -s 0 -c 7 -z 4096 -d /dev/zero
dmesg | grep -qi 'reservation conflict' || fail "the kernel tells of no conflict"
paths_live "$nqn" 1 || fail "the controller of a host that was taken over is gone"
disconnect "$nqn"
refused || fail "a host that was taken over connects"
ok "take-over: a host that was connected gets Reservation Conflict, keeps its controller, and does not come back"
host attach "$hostnqn" || fail "attach"
connect "${ports[0]}" "$nqn"
disk=$(disk "$nqn")
same "$disk" 0 /tmp/pattern 0 4096 || fail "a write that was refused took effect"
verify "$disk" --rw=randwrite --bs=4k --iodepth=4 --size=512k
disconnect "$nqn"
host detach "$hostnqn" || fail "detach"
connect "${ports[0]}" "$nqn"
disk=$(disk "$nqn")
ok "take-over: attached again it finds its data as it was, and writes"

# --- two paths, one of which is drained, then dies under load
gone() { ! nvme discover -t tcp -a "$address" -s "${ports[0]}" | grep -q "trsvcid: *${ports[1]}\$"; }
connect "${ports[1]}" "$nqn" --nr-io-queues=2
within 20 paths_live "$nqn" 2 || fail "not two paths: $(nvme list-subsys)"
ana_is() { # PORT STATE
  local controller
  for controller in /sys/class/nvme/nvme*; do
    grep -q "trsvcid=$1\b" "$controller/address" 2>/dev/null && [ "$(cat "$controller"/nvme*c*n1/ana_state)" = "$2" ] && return
  done
  return 1
}
# A discovery controller that stays, and what the kernel tells of its async events.
discovery_nqn=nqn.2014-08.org.nvmexpress.discovery
discovery_controller() {
  local controller
  for controller in /sys/class/nvme/nvme*; do
    [ "$(cat "$controller/subsysnqn" 2>/dev/null)" = $discovery_nqn ] && echo "/dev/${controller##*/}" && return
  done
  return 1
}
uevent env >>/tmp/uevents 2>/dev/null &
events=$!
nvme discover -t tcp -a "$address" -s "${ports[0]}" --persistent --keep-alive-tmo=5 >/dev/null || fail "discover --persistent"
stays=$(discovery_controller) || fail "no discovery controller stays"
nvme get-log "$stays" --log-id=0x71 --log-len=2056 >/tmp/seen 2>&1 || fail "the host discovery log: $(cat /tmp/seen)"
told_of_discovery() { grep -q '^NVME_AEN=0x70f002' /tmp/uevents; }
heard() { # reads the log through it, so that the next change is told
  nvme get-log "$stays" --log-id=0x70 --log-len=1024 >/dev/null || fail "the discovery log of $stays"
  : >/tmp/uevents
}
heard
for port in "${ports[0]}" "${ports[1]}"; do
  within 20 ana_is "$port" optimized || fail "the path by $port is not optimized"
done
fio --name=drain --filename="$disk" --direct=1 --ioengine=libaio --rw=randwrite --bs=4k --iodepth=16 --size=16M \
  --time_based --runtime=6 --verify=crc32c --verify_backlog=256 --verify_fatal=1 --verify_state_save=0 \
  --output=/tmp/fio &
load=$!
host drain 2 || fail "drain"
within 20 ana_is "${ports[1]}" non-optimized || fail "the path to the drained target is optimized still"
ana_is "${ports[0]}" optimized || fail "the other path is not"
within 15 gone || fail "discovery still lists the drained target"
within 15 told_of_discovery || fail "no async event of discovery when a target was drained: $(cat /tmp/uevents)"
heard
host undrain 2 || fail "undrain"
within 20 ana_is "${ports[1]}" optimized || fail "the path did not become optimized again"
within 15 told_of_discovery || fail "no async event of discovery when a target was drained no more"
heard
wait $load || { cat /tmp/fio; fail "IO failed while a target was drained"; }
ok "ANA: a drained target's path turns non-optimized by its async event, leaves discovery, and comes back"
fio --name=multipath --filename="$disk" --direct=1 --ioengine=libaio --rw=randwrite --bs=4k --iodepth=16 --size=16M \
  --time_based --runtime=12 --verify=crc32c --verify_backlog=256 --verify_fatal=1 --verify_state_save=0 \
  --output=/tmp/fio &
load=$!
sleep 3
host kill 1 || fail "kill"
within 15 paths_live "$nqn" 1 || fail "the path to the dead target did not go"
within 15 gone || fail "discovery still lists the dead target"
within 15 told_of_discovery || fail "no async event of discovery when a target died: $(cat /tmp/uevents)"
heard
ok "discovery: a controller that stays is told by its async event of a target that is drained, comes back, and dies"
wait $load || { cat /tmp/fio; fail "IO failed while one of two paths died"; }
ok "multipath: one of two targets killed under load with verification, no IO error, discovery without it"
host restart 1 || fail "restart"
within 60 paths_live "$nqn" 2 || fail "the path did not come back: $(nvme list-subsys)"
within 15 told_of_discovery || fail "no async event of discovery when a target came back"
back() { nvme discover -t tcp -a "$address" -s "${ports[0]}" | grep -q "trsvcid: *${ports[1]}\$"; }
within 15 back || fail "discovery without the target that came back"
verify "$disk" --rw=randwrite --bs=4k --iodepth=16 --size=1M
ok "multipath: the path is back after its target's restart"
disconnect "$nqn"
disconnect $discovery_nqn
kill $events
# Not without their colons: calibration speaks of loops.
dmesg | grep 'BUG: \|I/O error\|Oops: ' && fail "the kernel complains"
ok "the guest's kernel saw no IO error"
