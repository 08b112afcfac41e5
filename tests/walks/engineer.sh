# An engineer with eight GPUs and own documents: what is installed, train on from a checkpoint, use the result elsewhere.
# Faked: the GPUs' device files, the GPUs (eight CPU devices), and the checkpoint (the demo model).
say "What will be installed here?"
try env DEVICE_ROOT="$GPU_ROOT" sh "$PROJECT/install.sh" -n .venv

say "My documents become tokens."
try llama-jax prepare documents/*.txt --tokenizer "$DEMO" --out data/own --holdout 0.2

say "Train the checkpoint on, over all eight."
try llama-jax pretrain --config own.toml --stage 1 --init "$DEMO" --run-dir runs/own

say "Look at the result, on another mesh."
try llama-jax generate --checkpoint runs/own --mesh data=2,tensor=4 --max-new-tokens 8 "the king"

say "Take it to other programs."
try llama-jax convert runs/own own-hf --to hf
try ls own-hf

say "A mesh that the heads do not allow."
fails llama-jax generate --checkpoint runs/own --mesh tensor=7 "the king"
