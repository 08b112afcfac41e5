# A researcher on a free TPU VM (v5e-8), with a Hugging Face token: Llama 3.1 8B Instruct, chatting in ten minutes.
# Faked: the TPU's device files, the chips (eight CPU devices), the hub and the 8B (the demo model in its place).
model=meta-llama/Llama-3.1-8B-Instruct

say "What will be installed here?"
try env DEVICE_ROOT="$TPU_ROOT" sh "$PROJECT/install.sh" -n .venv

say "Does it run at all?"
try llama-jax generate --max-new-tokens 8 "import os"

say "The model, before the licence is accepted."
fails llama-jax generate --checkpoint $model --chat "Hello"

say "With the token."
export HF_TOKEN=hf_accepted
try llama-jax generate --checkpoint $model --chat "Hello" --max-new-tokens 8

say "Once more: nothing is fetched, nothing compiled."
try llama-jax generate --checkpoint $model --chat "Hello" --max-new-tokens 8
