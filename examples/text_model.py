"""The same cache under a text model: python examples/text_model.py [MODEL]

Without an argument a tiny random Llama is used, so that the example runs anywhere; its text is meaningless.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import tieredkv

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", help="a local path or hub id; it sums up the README")


def main() -> None:
    arguments = parser.parse_args()
    if arguments.model is not None:
        try:
            model = AutoModelForCausalLM.from_pretrained(arguments.model)
            tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        except (OSError, ValueError) as error:
            parser.error(f"{arguments.model}: no usable model found there ({str(error).splitlines()[0]}).")
        readme = Path(__file__).parents[1] / "README.md"
        ids = tokenizer(readme.read_text() + "\nIn short:", return_tensors="pt").input_ids
    else:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
            max_position_embeddings=8192,
        )
        model, tokenizer, ids = LlamaForCausalLM(config).eval(), None, torch.randint(3, 512, (1, 4000))
    with (
        tieredkv.use_attention(model),
        tieredkv.TieredCache(model.config, gpu_kv_gb=0.001, max_new_tokens=32) as cache,
    ):
        # Before transformers 5.24 the argument is called past_key_values.
        out = model.generate(ids, cache=cache, max_new_tokens=32, do_sample=False)
        print(tokenizer.decode(out[0, ids.shape[1] :]) if tokenizer else out[0, ids.shape[1] :].tolist())
        print(f"at most {cache.ledger.peak_bytes:,} bytes on the device, {cache.host_bytes:,} on the host")


if __name__ == "__main__":
    main()
