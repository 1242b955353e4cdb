#!/usr/bin/env bash
# Runs inside the system that boot.sh boots, as root; writes /probe.log, and /journal.log where something is wrong.
set -uo pipefail
exec >/probe.log 2>&1
end() {
    journalctl --no-pager -u neuron -u cortex -u 'neuron-upgrade@*' -u polkit >/journal.log
    systemctl poweroff
    exit
}
fail() {
    echo "FAILED: $*"
    end
}
is() { # is UNIT PROPERTY VALUE
    local found
    found=$(systemctl show -P "$2" "$1")
    [ "$found" = "$3" ] || fail "$2 of $1 is '$found' and not '$3'"
}
# Waits for at most so many seconds until a command succeeds.
until_ok() {
    local seconds=$1
    shift
    for _ in $(seq $((seconds * 10))); do
        "$@" >/dev/null 2>&1 && return
        sleep 0.1
    done
    fail "not within $seconds s: $*"
}
shows() { [ "$(systemctl show -P "$2" "$1")" = "$3" ]; }
drop_in() { # drop_in UNIT LINE...
    local folder=/run/systemd/system/$1.d
    mkdir -p "$folder"
    shift
    printf '%s\n' '[Service]' "$@" >"$folder/probe.conf"
    systemctl daemon-reload
}

systemctl start neuron cortex || fail "they do not start"
is neuron User neuron
until_ok 5 shows neuron StatusText "serving; models: 1"
until_ok 5 shows cortex StatusText "serving; 1 of 1 workers are routable"
cortex chat demo "What is a drain?" | grep -q "empties a worker" || fail "the answer is not the trained one"
echo "READY, statuses, an answer; users, folders, the credential and the sandbox fit"

systemctl kill --signal KILL neuron
until_ok 10 shows neuron NRestarts 1
until_ok 10 shows neuron ActiveState active
echo '[' >>/etc/cortex/neuron.toml
systemctl kill --signal KILL neuron
until_ok 10 shows neuron ActiveState failed
is neuron ExecMainStatus 78
sed -i '$d' /etc/cortex/neuron.toml
echo "a crash is started again, an unusable configuration is not"

systemctl reset-failed neuron
systemctl start neuron || fail "it does not start again"
until_ok 10 sh -c 'cortex status | grep -q "ready .* true"'
restarts=$(systemctl show -P NRestarts neuron)
cortex upgrade probe vm --token-file /etc/credstore/cortex.token >/run/upgrade.log 2>&1 || fail "upgrade: $(cat /run/upgrade.log)"
[ "$(cat /run/upgraded-by 2>/dev/null)" = 0 ] || fail "the upgrade did not run as root"
until_ok 10 shows neuron ActiveState active
[ "$(systemctl show -P NRestarts neuron)" -gt "$restarts" ] || fail "the upgrade did not restart the worker"
if runuser -u neuron -- systemctl --no-ask-password stop cortex 2>/dev/null; then fail "the worker may stop the gateway"; fi
if runuser -u neuron -- systemctl --no-ask-password stop neuron-upgrade@probe 2>/dev/null; then fail "the worker may stop upgrades"; fi
is cortex ActiveState active
echo "an upgrade runs as root, by the worker's own word, and nothing else does"

# More time than the unit gives, for a start that gets on and for such a stop; hooks take it.
for hook in before_load:2 after_healthy:6 before_stop:2 after_unload:4; do
    printf '[[hooks.run]]\non = "%s"\ncommand = ["sleep", "%s"]\n' "${hook%:*}" "${hook#*:}" >>/etc/cortex/neuron.toml
done
systemctl stop neuron || fail "it does not stop"
is neuron Result success
drop_in neuron.service TimeoutStartSec=3s TimeoutStopSec=3s WatchdogSec=4s
systemctl start neuron || fail "a start that gets on was cut off"
begun=$SECONDS
systemctl stop neuron || fail "it does not stop"
is neuron Result success
[ $((SECONDS - begun)) -ge 5 ] || fail "the stop was over after $((SECONDS - begun)) s"
echo "a start of 8 s and a stop of 6 s outlast timeouts of 3 s"

sed -i '/^\[\[hooks.run\]\]$/,$d' /etc/cortex/neuron.toml
systemctl start neuron || fail "it does not start"
restarts=$(systemctl show -P NRestarts neuron)
kill -STOP "$(systemctl show -P MainPID neuron)"
until_ok 20 shows neuron NRestarts $((restarts + 1))
until_ok 10 shows neuron ActiveState active
journalctl -u neuron | grep -q 'Watchdog timeout' || fail "something else than the watchdog restarted it"
echo "one that is stuck is killed by the watchdog and started again"

# Without a credential, on loopback, and with what the packages for GPUs add; there is no GPU here.
systemctl stop neuron || fail "it does not stop"
rm /etc/credstore/cortex.token
sed -i 's|0.0.0.0:13231|127.0.0.1:13231|' /etc/cortex/neuron.toml
mkdir -p /run/systemd/system/neuron.service.d
cp /srv/50-cuda.conf /run/systemd/system/neuron.service.d/
systemctl daemon-reload
systemctl start neuron || fail "it does not start without a credential, under the drop-in of GPUs"
is neuron PrivateDevices no
echo "no credential is needed on loopback; the drop-in of GPUs is no burden where there is none"

systemctl stop neuron cortex || fail "they do not stop"
for unit in neuron cortex; do
    is $unit Result success
    is $unit ExecMainStatus 0
done
echo "all is well"
end
