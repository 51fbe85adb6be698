#!/usr/bin/env bash
# Run a command where testcontainers finds a container engine:
#
#     infra/containers/with-engine.sh .venv/bin/python -m pytest --brokers=containers
#
# A Docker engine that answers is used with the public images of docker-compose.yml. Without one, podman
# is installed (as root or through sudo) and serves Docker's interface for as long as the command runs;
# stand-ins for the images are then built here, once, from the machine's own Debian mirror and Kafka jars.
set -euo pipefail
cd "$(dirname "$0")/../.."

if [ $# -eq 0 ]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0"
    exit 2
fi
if docker info >/dev/null 2>&1; then
    exec "$@"
fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then
    if ! sudo -n true 2>/dev/null; then
        echo "no Docker engine answers, and installing podman needs root: start Docker, or run as root" >&2
        exit 1
    fi
    as_root=(sudo -n)
fi

packages=(podman runc busybox-static netavark aardvark-dns iptables debootstrap)
if ! dpkg -s "${packages[@]}" >/dev/null 2>&1; then
    echo "installing ${packages[*]}"
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
fi

work=$(mktemp -d)
finish() {
    # The service holds the socket; the root file system belongs to root.
    [ -z "${service:-}" ] || "${as_root[@]}" kill "$service" 2>/dev/null || true
    "${as_root[@]}" rm -rf "$work"
}
trap finish EXIT

# crun, podman's default, fails where cgroup v1 and v2 are mounted side by side.
cat >"$work/containers.conf" <<'CONF'
[containers]
default_ulimits=["nofile=20000:20000","nproc=1024:1024"]
[engine]
runtime="runc"
cgroup_manager="cgroupfs"
[network]
network_backend="netavark"
CONF
podman() {
    "${as_root[@]}" env CONTAINERS_CONF="$work/containers.conf" podman "$@"
}

image_of() {
    awk -v service="  $1:" '$0 == service {inside = 1} inside && $1 == "image:" {print $2; exit}' docker-compose.yml
}
kafka_image=docker.io/$(image_of kafka)
redis_image=docker.io/library/$(image_of redis)

if ! podman image exists "$kafka_image" || ! podman image exists "$redis_image"; then
    suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
    mirror=$(apt-get indextargets --format '$(CODENAME) $(COMPONENT) $(REPO_URI)' 'Created-By: Packages' |
        awk -v suite="$suite" '$1 == suite && $2 == "main" {print $3; exit}')
    eval "$(apt-config shell http_proxy Acquire::http::Proxy)"
    echo "building $kafka_image and $redis_image from Debian $suite"
    root=$work/root
    jars=$(.venv/bin/python -c 'from infra.local.kafka import ensure_jars; print(ensure_jars())')
    "${as_root[@]}" env ${http_proxy:+http_proxy="$http_proxy"} debootstrap --variant=minbase \
        --include=openjdk-17-jre-headless,redis-server "$suite" "$root" "$mirror" >"$work/debootstrap.log" ||
        { tail -20 "$work/debootstrap.log" >&2; exit 1; }
    "${as_root[@]}" rm -rf "$root/var/cache/apt" "$root/var/lib/apt/lists"
    "${as_root[@]}" mkdir -p "$root/opt/kafka" "$root/data" "$root/var/lib/kafka/data"
    "${as_root[@]}" tar -C "$root" -c . | podman import -q --change 'WORKDIR /data' --change 'CMD ["redis-server"]' - "$redis_image" >/dev/null
    "${as_root[@]}" cp -r "$jars" "$root/opt/kafka/libs"
    "${as_root[@]}" install -m 755 infra/containers/kafka-entrypoint.sh "$root/opt/kafka/entrypoint.sh"
    "${as_root[@]}" tar -C "$root" -c . | podman import -q --change 'CMD ["/opt/kafka/entrypoint.sh"]' - "$kafka_image" >/dev/null
    "${as_root[@]}" rm -rf "$root"
fi

socket=$work/podman.sock
# Not through the function above: the process to end at exit is podman's own.
"${as_root[@]}" env CONTAINERS_CONF="$work/containers.conf" \
    podman system service --time=0 "unix://$socket" >"$work/service.log" 2>&1 &
service=$!
for _ in $(seq 100); do
    [ -S "$socket" ] && break
    sleep 0.1
done
[ -S "$socket" ] || { cat "$work/service.log" >&2; exit 1; }
[ ${#as_root[@]} -eq 0 ] || { "${as_root[@]}" chmod 666 "$socket"; "${as_root[@]}" chmod 755 "$work"; }

# Ryuk, the reaper of testcontainers, is one more public image; each fixture stops its own container.
export DOCKER_HOST="unix://$socket" TESTCONTAINERS_RYUK_DISABLED=true TESTCONTAINERS_CONNECTION_MODE=docker_host
"$@"
