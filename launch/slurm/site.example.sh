# Copy this file to launch/slurm/site.sh and keep what your cluster needs. train.sbatch sources it once per job, on the first
# node, after .venv. Everything is optional.

# Modules, conda, variables. The network interface of NCCL and gloo, where they choose a wrong one (ip -brief address):
#   module load cuda/12.8
#   source ~/miniconda3/bin/activate kd
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
#   export HF_HOME=/scratch/$USER/hf HF_HUB_OFFLINE=1

# Further flags of srun, for example those of pyxis:
#   srun_flags=(--container-image=/images/pytorch.sqsh --container-mounts="$PWD:$PWD" --container-workdir="$PWD")

# Words in front of the command on every node, for example those of apptainer:
#   inside=(apptainer exec --nv --bind "$PWD" /images/pytorch.sif)
