// The official OpenAI SDK for Node against a gateway: every endpoint that is supported.
//
//     npm ci
//     node openai_sdk.mjs http://127.0.0.1:31313/v1 MODEL

import assert from "node:assert/strict";
import OpenAI from "openai";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "any", maxRetries: 0 });
const messages = [{ role: "user", content: "What is a drain?" }];
const chat = (more) => client.chat.completions.create({ model, messages, temperature: 0, max_tokens: 24, ...more });
const text = (more) => client.completions.create({ model, prompt: "A drain", temperature: 0, max_tokens: 24, ...more });

const names = [];
for await (const entry of client.models.list()) names.push(entry.id);
assert.ok(names.includes(model));
assert.equal((await client.models.retrieve(model)).object, "model");

const whole = await chat({});
const content = whole.choices[0].message.content;
const chunks = [];
for await (const chunk of await chat({ stream: true, stream_options: { include_usage: true } })) chunks.push(chunk);
assert.equal(chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join(""), content);
assert.equal(chunks.at(-1).usage.completion_tokens, whole.usage.completion_tokens);
const runner = client.chat.completions.stream({ model, messages, temperature: 0, max_tokens: 24 });
assert.equal(await runner.finalContent(), content);

const told = (await chat({ logprobs: true, top_logprobs: 2, max_tokens: 5 })).choices[0].logprobs.content;
const streamed = [];
for await (const chunk of await chat({ logprobs: true, top_logprobs: 2, max_tokens: 5, stream: true })) {
  streamed.push(...(chunk.choices[0]?.logprobs?.content ?? []));
}
assert.deepEqual(streamed, told);
assert.ok(told.every((entry) => entry.top_logprobs.length === 2));

const goneOn = await text({ prompt: ["A drain", "A gateway"], logprobs: 1 });
assert.deepEqual(goneOn.choices.map((choice) => choice.index), [0, 1]);
let joined = "";
for await (const chunk of await text({ stream: true })) joined += chunk.choices[0]?.text ?? "";
assert.equal(joined, goneOn.choices[0].text);

const [vector, again] = await Promise.all([
  client.embeddings.create({ model, input: "a drain" }),
  client.embeddings.create({ model, input: ["a drain"], encoding_format: "float" }),
]);
const length = vector.data[0].embedding.length;
assert.equal(length, again.data[0].embedding.length);
assert.ok(vector.data[0].embedding.every((number, i) => Math.abs(number - again.data[0].embedding[i]) < 1e-6));

await assert.rejects(chat({ temperature: 9 }), OpenAI.BadRequestError);
await assert.rejects(chat({ model: "nobody" }), OpenAI.NotFoundError);
await assert.rejects(client.embeddings.create({ model, input: "" }), OpenAI.BadRequestError);

const left = await chat({ stream: true });
for await (const _ of left) break;
console.log("the Node SDK lists, chats, goes on with texts, embeds, tells tokens, errs and cancels");
