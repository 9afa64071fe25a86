#!/bin/bash
# Sets up a Slurm cluster of this Debian machine alone, from Debian's packages, to try `export-zoo matrix --slurm`. As root.
#   sudo bash ci/one_node_slurm.sh
#   export-zoo matrix ci/matrix.yaml --job sample --out matrix --slurm array.sh && sbatch --wait array.sh
set -euo pipefail
if [ -e /etc/slurm/slurm.conf ]; then
    echo "/etc/slurm/slurm.conf is there already: this machine belongs to a cluster" >&2
    exit 1
fi
apt-get install --yes --quiet=2 slurm-wlm munge
name=$(hostname --short)
cat > /etc/slurm/slurm.conf <<CONF
ClusterName=$name
SlurmctldHost=$name
NodeName=$name CPUs=$(nproc) RealMemory=$(awk '/MemTotal/ {print int($2 * 0.9 / 1024)}' /proc/meminfo)
PartitionName=all Nodes=ALL Default=YES State=UP
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
StateSaveLocation=/var/lib/slurm/slurmctld
SlurmdSpoolDir=/var/lib/slurm/slurmd
ReturnToService=2
CONF
mkdir --parents /run/munge /var/lib/slurm/slurmctld /var/lib/slurm/slurmd /var/log/slurm
chown munge /run/munge
chown slurm /var/lib/slurm/slurmctld /var/log/slurm
[ -e /etc/munge/munge.key ] || mungekey --create
# Not by systemd: a container has none.
pgrep --exact munged > /dev/null || runuser --user munge munged
slurmctld
slurmd
sinfo
