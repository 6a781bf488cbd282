// openai for Node: whole, streamed, the helper, a client that leaves, completions and responses.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const ask = { model: "demo", messages, temperature: 0, max_tokens: 24 };

const whole = (await client.chat.completions.create(ask)).choices[0].message.content;
assert.match(whole, /Paris/);
let text = "", usage;
for await (const chunk of await client.chat.completions.create(
    { ...ask, stream: true, stream_options: { include_usage: true } })) {
  text += chunk.choices[0]?.delta.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(text, whole);
assert.ok(usage.prompt_tokens > 5);
assert.equal(await client.chat.completions.stream(ask).finalContent(), whole);

const stream = await client.chat.completions.create({ ...ask, max_tokens: 500, ignore_eos: true, stream: true });
for await (const _ of stream) break;  // leaves
assert.match((await client.completions.create({ model: "demo", prompt: "The sea", max_tokens: 4 })).choices[0].text, /./);

const response = await client.responses.create({ model: "demo", input: messages[0].content, temperature: 0 });
assert.match(response.output_text, /Paris/);
const kinds = [];
for await (const event of await client.responses.create(
    { model: "demo", input: "Hi", stream: true, max_output_tokens: 16 })) kinds.push(event.type);
assert.equal(kinds[0], "response.created");
assert.match(kinds.at(-1), /response\.(completed|incomplete)/);
await assert.rejects(client.chat.completions.create({ ...ask, n: 99 }), (e) => e.status === 400 && e.param === "n");
