#!/usr/bin/env bash
# Install what the cluster tests need, from Debian's or Ubuntu's packages:
#   slurm-wlm              slurmctld, slurmd and the clients
#   munge                  authentication between them
#   slurmdbd, mariadb      accounting (sacct)
#   patchelf               for a later SLURM beside it, in build/slurm (tests/slurm/newer.py)
# It starts nothing; tests/slurm/cluster.py does.
set -euo pipefail

packages=(slurm-wlm munge slurmdbd mariadb-server patchelf)
as_root=()
if [ "$(id -u)" -ne 0 ]; then
    as_root=(sudo)
fi

# Without it, the tests of later versions skip; all others run.
newer() {
    python3 "$(dirname "$0")/newer.py" ||
        echo "cluster: no later SLURM could be made from Debian's archive" >&2
}

missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' ||
        missing+=("$package")
done
if [ "${#missing[@]}" -eq 0 ]; then
    echo "cluster: ${packages[*]} are installed"
    newer
    exit 0
fi

export DEBIAN_FRONTEND=noninteractive
"${as_root[@]}" apt-get update -q
# No service may start at installation: the cluster script runs its own, on ports of its own.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
    "${as_root[@]}" chmod +x "$policy"
    trap '"${as_root[@]}" rm -f "$policy"' EXIT
fi
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -q -y --no-install-recommends "${missing[@]}"
newer
