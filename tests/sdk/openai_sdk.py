#!/usr/bin/env python3
"""The official OpenAI SDK against a gateway that serves the demo model.

    pip install openai
    cargo xtask demo                                    # in another terminal
    openai_sdk.py http://127.0.0.1:31313/v1
"""

import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1], api_key="any", max_retries=0)
ASK = [{"role": "user", "content": "What is a drain?"}]

names = [model.id for model in client.models.list()]
assert names == ["demo"], names
assert client.models.retrieve("demo").object == "model"

whole = client.chat.completions.create(model="demo", messages=ASK, temperature=0)
text = whole.choices[0].message.content
assert text.startswith("A drain empties a worker"), text
assert whole.choices[0].finish_reason == "stop" and whole.usage.total_tokens > 20

stream = client.chat.completions.create(
    model="demo", messages=ASK, temperature=0, stream=True, stream_options={"include_usage": True}
)
chunks = list(stream)
assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
assert chunks[0].choices[0].delta.role == "assistant"
assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
assert all(c.usage is None for c in chunks[:-1])

stopped = client.chat.completions.create(model="demo", messages=ASK, temperature=0, stop=["gateway"])
assert stopped.choices[0].message.content == text[: text.index("gateway")]
assert stopped.choices[0].finish_reason == "stop"

for arguments, kind in [
    ({"model": "nobody"}, openai.NotFoundError),
    ({"temperature": 9}, openai.BadRequestError),
    ({"n": 3}, openai.BadRequestError),
    ({"max_tokens": -1}, openai.BadRequestError),
]:
    try:
        client.chat.completions.create(**{"model": "demo", "messages": ASK, **arguments})
    except kind as error:
        assert error.body["message"] and error.body["code"], error.body
    else:
        raise AssertionError(f"{arguments} was accepted")

with client.chat.completions.create(model="demo", messages=ASK, stream=True) as left:
    next(iter(left))

assert client.chat.completions.create(model="demo", messages=ASK, max_tokens=2).choices[0].finish_reason == "length"
print("the SDK lists, chats, streams with usage, stops, errs and cancels")
