# A platform engineer with a reserved pod: one command on every worker, one worker started alone, one model for all.
# Faked: the pod (four processes of two CPU devices each on one machine).
export JAX_NUM_CPU_DEVICES=2 JAX_COORDINATOR_ADDRESS=127.0.0.1:$PORT JAX_NUM_PROCESSES=4

say "One worker started alone, by mistake."
fails env JAX_PROCESS_ID=0 timeout 25 llama-jax generate --max-new-tokens 8 "import os"

say "The same command on all four; the first one writes."
for id in 1 2 3; do
    JAX_PROCESS_ID=$id llama-jax generate --max-new-tokens 8 "import os" >worker-$id.out 2>worker-$id.err &
done
try env JAX_PROCESS_ID=0 llama-jax generate --max-new-tokens 8 "import os"
wait
try cat worker-1.out worker-2.out worker-3.out

say "A run that the pod cannot hold, before anything is prepared."
unset JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES
fails llama-jax pretrain --config llama3.1-8b --stage 1 --set run.mesh=fsdp=2
