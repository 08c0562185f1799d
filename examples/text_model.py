"""The same cache under a text model: python examples/text_model.py [MODEL]

Without an argument a tiny random Llama is used, so that the example runs anywhere; its text is meaningless.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import tieredkv


def main() -> None:
    if len(sys.argv) == 2:
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
        tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
        ids = tokenizer(Path("README.md").read_text() + "\nIn short:", return_tensors="pt").input_ids
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
