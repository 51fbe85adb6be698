#!/bin/sh
# The part of the public Kafka image's entry point that we use: KAFKA_A_B=c becomes a.b=c.
set -eu
properties=/tmp/server.properties
export LC_ALL=C
env | sed -n 's/^KAFKA_\([A-Z0-9_]*=.*\)$/\1/p' | grep -v '^HEAP_OPTS=' | while IFS='=' read -r name value; do
    echo "$(echo "$name" | tr 'A-Z_' 'a-z.')=$value"
done >"$properties"
grep -q '^log\.dirs=' "$properties" || echo 'log.dirs=/var/lib/kafka/data' >>"$properties"
export CLASSPATH='/opt/kafka/libs/*'
java kafka.tools.StorageTool format --ignore-formatted -t "${CLUSTER_ID:-5L6g3nShT-eMCtK--X86sw}" -c "$properties"
# shellcheck disable=SC2086 # the heap options are several words
exec java ${KAFKA_HEAP_OPTS:--Xmx512m} -XX:+UseSerialGC kafka.Kafka "$properties"
