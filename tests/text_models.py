"""Tiny models that only read text, of three families, built on the spot.

What they bring is what published ones bring: beginnings of text that template and tokenizer both
write, ends of turn that are not the end of text, templates without a system's turn."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n"
    "{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}[END]\n"
    "{% endif %}{% endfor %}"
)
WORDS = "Which of these is it? A: fever B: rash. The answer is the rash, not the fever. " * 4
SIZE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.3,
}
FAMILIES = {
    "llama": {
        "template": LLAMA,
        "special": ["<|bos|>", "<|eos|>", "<|start|>", "<|end|>", "<|eot|>"],
        "config": LlamaConfig,
        "more": {"tie_word_embeddings": True},
        "adds_begin": True,
        "turn_end": "<|eot|>",
    },
    "qwen": {
        "template": QWEN,
        "special": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "config": Qwen3Config,
        "more": {"tie_word_embeddings": False, "head_dim": 8},
        "adds_begin": False,
        "turn_end": "<|im_end|>",
    },
    "mistral": {
        "template": MISTRAL,
        "special": ["<s>", "</s>", "[INST]", "[/INST]", "[END]"],
        "config": MistralConfig,
        "more": {"tie_word_embeddings": False, "sliding_window": 16, "head_dim": 8},
        "adds_begin": True,
        "turn_end": "[END]",
    },
}


def build_tokenizer(family):
    "A byte-level tokenizer with a family's marks; Qwen's alone has a pad token."
    facts = FAMILIES[family]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=sorted(alphabet),
        special_tokens=facts["special"],
        show_progress=False,
    )
    backend.train_from_iterator([WORDS], trainer)
    first, second, *others = facts["special"]
    if family == "qwen":
        named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    else:
        named = {"bos_token": first, "eos_token": second, "additional_special_tokens": others}
    if facts["adds_begin"]:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, backend.token_to_id(first))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=facts["template"], **named
    )


def build_text_model(family, seed=0, **changes):
    "(model, tokenizer) of a family with random weights."
    facts, tokenizer = FAMILIES[family], build_tokenizer(family)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(facts["turn_end"])]
    config = facts["config"](
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        **{**SIZE, **facts["more"], **changes},
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    # as published ones do: values for sampling, and an end of its own
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.1,
        top_k=1,
        repetition_penalty=1.5,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model, tokenizer


def save_text_model(family, folder, **changes):
    "A folder as the hub has it."
    model, tokenizer = build_text_model(family, **changes)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
