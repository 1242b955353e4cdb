#!/usr/bin/env python3
"""llama.cpp as a peer of `bench engine` and `bench logprobs`: one JSON command a line in, one JSON answer a line out.

    python3 -m venv peer
    CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" peer/bin/pip install llama-cpp-python==0.3.36 numpy
    cargo xtask bench engine --peer peer/bin/python

Commands: {"op": "open", "model", "threads", "context", "sequences", "flash", "f32_kv"}, {"op": "prefill", "tokens"},
{"op": "fill", "depth"}, {"op": "decode", "tokens"}, {"op": "batch", "rows", "tokens"}, {"op": "logprobs", "tokens", "ids"},
{"op": "quantize", "source", "target", "kind"}. Times are wall seconds of the calls alone.
"""

import ctypes
import json
import os
import sys
import time

import llama_cpp as ll
import numpy as np

STEP = 512


class Peer:
    def __init__(self):
        self.model = self.ctx = None
        self.path = None
        self.depth = 0

    def open(self, model, threads, context, sequences=1, flash=False, f32_kv=False):
        if self.ctx:
            ll.llama_free(self.ctx)
        if self.path != model:
            if self.model:
                ll.llama_model_free(self.model)
            params = ll.llama_model_default_params()
            self.model = ll.llama_model_load_from_file(model.encode(), params)
            self.path = model
        params = ll.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = STEP
        params.n_ubatch = STEP
        params.n_seq_max = sequences
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = 1 if flash else 0
        if f32_kv:
            params.type_k = params.type_v = 0
        params.no_perf = True
        self.ctx = ll.llama_init_from_model(self.model, params)
        if not self.ctx:
            raise RuntimeError("llama.cpp made no context")
        self.vocabulary = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(self.model))
        self.depth = 0
        return {"vocabulary": self.vocabulary, "version": ll.__version__}

    def clear(self):
        ll.llama_memory_clear(ll.llama_get_memory(self.ctx), True)
        self.depth = 0

    def run(self, tokens, positions, sequences, wanted):
        batch = ll.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = positions[i]
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequences[i]
            batch.logits[i] = wanted[i]
        begun = time.perf_counter()
        code = ll.llama_decode(self.ctx, batch)
        ll.llama_synchronize(self.ctx)
        taken = time.perf_counter() - begun
        ll.llama_batch_free(batch)
        if code != 0:
            raise RuntimeError(f"llama_decode gave {code}")
        return taken

    def prompt(self, count, start=0):
        return [((start + i) * 7919 + 13) % self.vocabulary for i in range(count)]

    def feed(self, tokens, start):
        taken = 0.0
        for at in range(0, len(tokens), STEP):
            part = tokens[at : at + STEP]
            last = at + len(part) == len(tokens)
            wanted = [0] * (len(part) - 1) + [int(last)]
            taken += self.run(part, range(start + at, start + at + len(part)), [0] * len(part), wanted)
        return taken

    def prefill(self, tokens):
        self.clear()
        return {"seconds": self.feed(self.prompt(tokens), 0)}

    def fill(self, depth):
        """The first tokens are computed; the others' cells are copies of theirs, moved to their positions."""
        self.clear()
        computed = min(depth, STEP)
        seconds = self.feed(self.prompt(computed), 0) if depth else 0.0
        memory = ll.llama_get_memory(self.ctx)
        if depth > computed:
            size = ll.llama_state_seq_get_size(self.ctx, 0)
            data = (ctypes.c_uint8 * size)()
            ll.llama_state_seq_get_data(self.ctx, data, size, 0)
        for start in range(computed, depth, STEP):
            if ll.llama_state_seq_set_data(self.ctx, data, size, 1) == 0:
                raise RuntimeError("llama.cpp took no copy of its own state")
            ll.llama_memory_seq_add(memory, 1, 0, -1, start)
            ll.llama_memory_seq_cp(memory, 1, 0, -1, -1)
            ll.llama_memory_seq_rm(memory, 1, -1, -1)
        self.depth = depth
        if depth:
            # The first step after it moves the keys; it must not be part of a cell.
            self.decode(1)
        return {"seconds": seconds}

    def decode(self, tokens):
        taken = 0.0
        for i in range(tokens):
            at = self.depth + i
            taken += self.run(self.prompt(1, at), [at], [0], [1])
        ll.llama_memory_seq_rm(ll.llama_get_memory(self.ctx), 0, self.depth, -1)
        return {"seconds": taken}

    def batch(self, rows, tokens):
        self.clear()
        taken = 0.0
        for i in range(tokens):
            each = [self.prompt(1, row * 64 + i)[0] for row in range(rows)]
            taken += self.run(each, [i] * rows, list(range(rows)), [1] * rows)
        self.clear()
        return {"seconds": taken}

    def logprobs(self, tokens, ids):
        self.clear()
        self.feed(tokens, 0)
        pointer = ll.llama_get_logits_ith(self.ctx, -1)
        logits = np.ctypeslib.as_array(pointer, shape=(self.vocabulary,)).astype(np.float64)
        shifted = logits - logits.max()
        logprobs = shifted - np.log(np.exp(shifted).sum())
        if not ids:
            ids = np.argsort(-logprobs)[:100]
        return {"logprobs": [[int(i), round(float(logprobs[i]), 6)] for i in ids]}

    def quantize(self, source, target, kind):
        params = ll.llama_model_quantize_default_params()
        params.ftype = kind
        params.nthread = os.cpu_count()
        part = target + ".part"
        if ll.llama_model_quantize(source.encode(), part.encode(), ctypes.byref(params)) != 0:
            raise RuntimeError(f"{source} was not quantised")
        os.rename(part, target)
        return {}


def main():
    # llama.cpp's own log says much; only its errors matter here.
    @ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
    def errors_only(level, text, _data):
        if level == 4:
            sys.stderr.write(text.decode(errors="replace"))

    ll.llama_log_set(errors_only, ctypes.c_void_p(0))
    ll.llama_backend_init()
    peer = Peer()
    for line in sys.stdin:
        command = json.loads(line)
        operation = command.pop("op")
        if operation.startswith("_") or operation not in Peer.__dict__:
            answer = {"error": f"there is no operation '{operation}'"}
        else:
            try:
                answer = getattr(peer, operation)(**command)
            except Exception as error:  # told to the other side, which decides
                answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
