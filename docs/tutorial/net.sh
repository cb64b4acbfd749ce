#!/bin/sh
# Three machines for the tutorial, as network namespaces: mgr, a and b, all named ot-*.
#   control 10.81.0.0/24 (mgr .1, a .11, b .12), migration 10.82.0.0/24 (a, b), guest 10.83.0.0/24 (client .100)
# usage: net.sh up | down
set -eu

down() {
    for ns in ot-mgr ot-a ot-b ot-sw; do
        ip netns del "$ns" 2>/dev/null || true
    done
}

card() { # namespace device mac switch
    ip link add "$2" netns "$1" address "$3" type veth peer name "$1-$2" netns ot-sw
    ip -n ot-sw link set "$1-$2" master "$4" up
    ip -n "$1" link set "$2" up
}

up() {
    down
    for ns in ot-mgr ot-a ot-b ot-sw; do
        ip netns add "$ns"
        ip -n "$ns" link set lo up
    done
    for switch in ctl mig gst; do
        ip -n ot-sw link add "$switch" type bridge
        ip -n ot-sw link set "$switch" up
    done
    card ot-mgr ctl0 02:81:00:00:00:01 ctl
    ip -n ot-mgr addr add 10.81.0.1/24 dev ctl0
    # The client of the guest lives in the manager's namespace here.
    card ot-mgr gst0 02:83:00:00:00:64 gst
    ip -n ot-mgr addr add 10.83.0.100/24 dev gst0
    for host in a:11:0b b:12:0c; do
        ns="ot-${host%%:*}"
        rest="${host#*:}"
        number="${rest%%:*}"
        hex="${rest#*:}"
        card "$ns" ctl0 "02:81:00:00:00:$hex" ctl
        card "$ns" mig0 "02:82:00:00:00:$hex" mig
        card "$ns" gst0 "02:83:00:00:00:$hex" gst
        ip -n "$ns" addr add "10.81.0.$number/24" dev ctl0
        ip -n "$ns" addr add "10.82.0.$number/24" dev mig0
        ip -n "$ns" link add br-guest type bridge
        ip -n "$ns" link set br-guest up
        ip -n "$ns" link set gst0 master br-guest
    done
}

case "${1-}" in
up) up ;;
down) down ;;
*) echo "usage: $0 up | down" >&2; exit 2 ;;
esac
