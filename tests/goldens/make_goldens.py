#!/usr/bin/env python3
"""Goldens of llama.cpp for the demo model, and for the outputs of stories260K.

    pip install llama-cpp-python numpy
    make_goldens.py quantize ../../examples/demo-model/demo-f16.gguf demo-q4_k_m.gguf
    make_goldens.py demo ../../examples/demo-model/demo-f16.gguf > demo-f16.json
    make_goldens.py demo ../../examples/demo-model/demo-q8_0.gguf > demo-q8_0.json
    make_goldens.py demo demo-q4_k_m.gguf > demo-q4_k_m.json
    make_goldens.py outputs stories260K-f32.gguf > stories260k-outputs.json

qwen3-0.6b-logprobs.json is made by `cargo xtask bench logprobs --peer bin/python`.
"""

import json
import sys

import llama_cpp
import numpy as np
from llama_cpp import Llama

QUESTIONS = [
    "What is cortex?",
    "What is a drain?",
    "Who are you?",
    "how do i start the demo",
    "Hello",
    "zebra umbrella 17 purple",
    "Wie hei\u00dft du?",
    "Please describe cortex to me.",
]


def evaluate(llm, ids):
    llm.reset()
    llm.eval(ids)
    return np.array(llm.scores[len(ids) - 1], dtype=np.float64)


TEXTS = [
    "Once upon a time, there was a little girl named Lily.",
    "He",
    "The dog and the cat played in the park all day. Then they went home to sleep, and the sun went down behind the hill.",
]


def outputs(path):
    """Pooled hidden states, brought to length 1, and how likely each token of the text was."""
    same = {"n_ctx": 512, "verbose": False, "n_threads": 2, "type_k": 0, "type_v": 0}
    pools = {"mean": llama_cpp.LLAMA_POOLING_TYPE_MEAN, "last": llama_cpp.LLAMA_POOLING_TYPE_LAST}
    vectors = {}
    for name, pooling in pools.items():
        llm = Llama(path, embedding=True, pooling_type=pooling, **same)
        vectors[name] = [llm.embed(text, normalize=True) for text in TEXTS]
    llm = Llama(path, logits_all=True, **same)
    out = []
    for i, text in enumerate(TEXTS):
        ids = llm.tokenize(text.encode(), add_bos=True)
        llm.reset()
        llm.eval(ids)
        logits = np.array(llm.scores[: len(ids)], dtype=np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        told = [round(float(logprobs[k][ids[k + 1]]), 6) for k in range(len(ids) - 1)]
        pooled = {name: [round(number, 7) for number in vectors[name][i]] for name in pools}
        out.append({"text": text, "ids": ids, "logprobs": told, **pooled})
    return out


def demo(path):
    llm = Llama(path, n_ctx=512, logits_all=True, verbose=False, n_threads=2, type_k=0, type_v=0)
    out = []
    for question in QUESTIONS:
        text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        prompt = llm.tokenize(text.encode(), add_bos=False, special=True)
        ids = list(prompt)
        while len(ids) - len(prompt) < 96:
            ids.append(int(np.argmax(evaluate(llm, ids))))
            if ids[-1] == llm.token_eos():
                break
        out.append({"question": question, "text": text, "prompt_ids": prompt, "token_ids": ids[len(prompt):]})
    return out


def quantize(source, target):
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    assert llama_cpp.llama_model_quantize(source.encode(), target.encode(), params) == 0


if __name__ == "__main__":
    if sys.argv[1] == "quantize":
        sys.exit(quantize(sys.argv[2], sys.argv[3]))
    make = {"demo": demo, "outputs": outputs}[sys.argv[1]]
    print("[\n" + ",\n".join(json.dumps(entry) for entry in make(sys.argv[2])) + "\n]")
