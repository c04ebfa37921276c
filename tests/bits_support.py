"""Small models for tests of layers at several bit widths."""

import torch

VOCABULARY = 97


def tiny_llama(seed=0):
    """A random LlamaForCausalLM with two layers, in eval mode; the global torch RNG is left as it was."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def tiny_quantized(seed=0, **adapters):
    """A quantized `tiny_llama` in peft's wrapper, with adapters that do something, and the layers' names."""
    from samplewise.plugins.bit_adapters import add_adapters
    from samplewise.plugins.multi_bit import quantize_model

    model = tiny_llama(seed)
    layers = quantize_model(model, group_size=32)
    wrapped = add_adapters(model, **{"rank": 4, "seed": seed, **adapters})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return wrapped, layers


def token_ids(rows=2, length=9, seed=0):
    """Random tokens, int64 ``(rows, length)``."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
