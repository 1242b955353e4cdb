#!/usr/bin/env python3
"""The official OpenAI SDK for Python against a gateway: every endpoint and every field that is supported.

    pip install openai
    openai_sdk.py http://127.0.0.1:31313/v1 MODEL
"""

import json
import math
import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1], api_key="any", max_retries=0)
MODEL = sys.argv[2]
ASK = [{"role": "user", "content": "What is a drain?"}]


def chat(**arguments):
    return client.chat.completions.create(**{"model": MODEL, "messages": ASK, "temperature": 0, "max_tokens": 24, **arguments})


def text(**arguments):
    return client.completions.create(**{"model": MODEL, "prompt": "A drain", "temperature": 0, "max_tokens": 24, **arguments})


assert MODEL in [model.id for model in client.models.list()]
assert client.models.retrieve(MODEL).object == "model"

# Chat: whole, streamed, stopped.
whole = chat()
content = whole.choices[0].message.content
assert whole.object == "chat.completion" and whole.choices[0].finish_reason in ("stop", "length")
assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
chunks = list(chat(stream=True, stream_options={"include_usage": True}))
assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == content
assert chunks[0].choices[0].delta.role == "assistant"
assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
assert all(c.usage is None for c in chunks[:-1])
stopped = chat(stop=[content[5:8]])
assert stopped.choices[0].message.content == content[: content.index(content[5:8])]
assert stopped.choices[0].finish_reason == "stop"
assert chat(max_tokens=2).choices[0].finish_reason == "length"
assert chat(max_tokens=None, max_completion_tokens=3).usage.completion_tokens <= 3

# Sampling: seeds repeat, choices are numbered, the rest is accepted.
warm = {"temperature": 1.2, "seed": 7, "top_p": 0.9, "n": 2}
assert [c.message.content for c in chat(**warm).choices] == [c.message.content for c in chat(**warm).choices]
assert [c.index for c in chat(n=3).choices] == [0, 1, 2]
chat(frequency_penalty=0.5, presence_penalty=-0.5, logit_bias={"5": 3}, user="u", store=False, service_tier="flex",
     metadata={"a": "b"}, prompt_cache_key="k", safety_identifier="s", parallel_tool_calls=True, response_format={"type": "text"},
     extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 2, "ignore_eos": True,
                 "stop_token_ids": [3], "cache_salt": "tenant"})

# Log-probabilities of a chat, whole and streamed.
told = chat(logprobs=True, top_logprobs=3, max_tokens=6).choices[0]
assert len(told.logprobs.content) >= 5 and told.message.content == chat(max_tokens=6).choices[0].message.content
for entry in told.logprobs.content:
    assert len(entry.top_logprobs) == 3 and entry.logprob <= entry.top_logprobs[0].logprob
    assert bytes(entry.bytes).decode(errors="replace") == entry.token
streamed = [c.choices[0] for c in chat(logprobs=True, top_logprobs=3, max_tokens=6, stream=True)]
tokens = [entry for choice in streamed if choice.logprobs for entry in choice.logprobs.content]
assert tokens == told.logprobs.content

# Calls that the model chooses come in pieces, which the SDK puts together, and are the answer's in one JSON; also in the
# words of functions.
if "caller" in [model.id for model in client.models.list()]:
    said = "\x02I ask.\n<tool_call>\n<function=weather>\n<parameter=city>\nA \"M\u00e9xico\"\n</parameter>\n" \
           "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>\x03"
    schema = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
              "required": ["city", "days"], "additionalProperties": False}
    function = {"name": "weather", "parameters": schema, "strict": True}
    ask = {"model": "caller", "messages": [{"role": "user", "content": said}], "max_tokens": 300}
    tools = [{"type": "function", "function": function}]
    with client.chat.completions.stream(**ask, tools=tools) as stream:
        pieces = [e.arguments_delta for e in stream if e.type == "tool_calls.function.arguments.delta"]
        choice = stream.get_final_completion().choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and choice.message.content == "I ask."
    assert call.function.name == "weather" and json.loads(call.function.arguments) == {"city": 'A "M\u00e9xico"', "days": 3}
    assert "".join(pieces) == call.function.arguments and len(pieces) > 10
    whole = client.chat.completions.create(**ask, tools=tools).choices[0]
    assert whole.message.tool_calls[0].function.arguments == call.function.arguments
    older = client.chat.completions.create(**ask, functions=[function]).choices[0]
    assert older.finish_reason == "function_call" and older.message.function_call.arguments == call.function.arguments

# Text completions.
gone_on = text()
assert gone_on.object == "text_completion" and gone_on.usage.completion_tokens <= 24
assert "".join(c.choices[0].text for c in text(stream=True)) == gone_on.choices[0].text
echoed = text(echo=True, logprobs=2, max_tokens=4).choices[0]
assert echoed.text.startswith("A drain") and echoed.logprobs.token_logprobs[0] is None
assert len(echoed.logprobs.tokens) == len(echoed.logprobs.token_logprobs) == len(echoed.logprobs.text_offset)
assert text(stop=gone_on.choices[0].text[3:5]).choices[0].finish_reason == "stop"
many = text(prompt=["A drain", "A gateway"], n=2, seed=1, user="u", best_of=2)
assert [c.index for c in many.choices] == [0, 1, 2, 3] and many.choices[0].text == gone_on.choices[0].text

# Embeddings: the SDK asks for base64 and decodes it unless told otherwise.
vectors = client.embeddings.create(model=MODEL, input=["a drain", "a gateway"])
plain = client.embeddings.create(model=MODEL, input="a drain", encoding_format="float")
assert [v.index for v in vectors.data] == [0, 1] and vectors.usage.prompt_tokens > plain.usage.prompt_tokens > 0
assert all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(vectors.data[0].embedding, plain.data[0].embedding))
assert math.isclose(sum(x * x for x in plain.data[0].embedding), 1, abs_tol=1e-4)
assert len(client.embeddings.create(model=MODEL, input=[[1, 2], [3]], dimensions=8).data[1].embedding) == 8

for make, arguments, kind in [
    (chat, {"model": "nobody"}, openai.NotFoundError),
    (chat, {"temperature": 9}, openai.BadRequestError),
    (chat, {"n": 300}, openai.BadRequestError),
    (chat, {"max_tokens": -1}, openai.BadRequestError),
    (chat, {"top_logprobs": 2}, openai.BadRequestError),
    (chat, {"modalities": ["text", "audio"]}, openai.BadRequestError),
    (text, {"suffix": "x"}, openai.BadRequestError),
    (text, {"best_of": 3}, openai.BadRequestError),
    (client.embeddings.create, {"model": MODEL, "input": ""}, openai.BadRequestError),
    (client.embeddings.create, {"model": MODEL, "input": "a", "dimensions": 1 << 30}, openai.BadRequestError),
]:
    try:
        make(**arguments)
    except kind as error:
        assert error.body["message"] and error.body["code"], error.body
    else:
        raise AssertionError(f"{arguments} was accepted")

with chat(stream=True) as left:
    next(iter(left))
print("the Python SDK lists, chats, goes on with texts, embeds, tells tokens, errs and cancels")
