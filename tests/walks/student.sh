# A student with a laptop who wants to understand Llama 3.1. Nothing is faked; `make demo` is what stands first.
say "make demo, once installed."
try llama-jax generate

say "Play."
try llama-jax generate "class Queue:" --temperature 0 --max-new-tokens 16
echo "The sys module" | try llama-jax generate --max-new-tokens 16
try llama-jax generate --json --max-new-tokens 2 "import "

say "Slips."
fails llama-jax generate ""
fails llama-jax generate --temperature -1 "x"
fails llama-jax generate --checkpoint nowhere "x"
fails llama-jax genrate

say "Eight devices that are not there."
try env JAX_NUM_CPU_DEVICES=8 llama-jax generate --mesh data=2,tensor=4 --max-new-tokens 8 "import os"

say "A training of my own, begun and looked at."
try llama-jax pretrain --stage 1 --set data.directory="$DATA" --set 'stage.1.phases=[{seq_len=64, tokens=8_192}]' \
    --set stage.1.batch_tokens=1024 --set run.eval_rows=4 --run-dir runs/try
try ls runs/try
try llama-jax generate --checkpoint runs/try --max-new-tokens 4 "def main():"
