// Anthropic's SDK for Node: whole, streamed, a tool that must be used, and the count of tokens.
import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";

const client = new Anthropic({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const ask = {
  model: "demo", max_tokens: 24, temperature: 0,
  messages: [{ role: "user", content: "What is the capital of France?" }],
};
const whole = await client.messages.create(ask);
assert.match(whole.content[0].text, /Paris/);
const final = await client.messages.stream(ask).finalMessage();
assert.equal(final.content[0].text, whole.content[0].text);
const tools = [{
  name: "look", description: "Looks a city up.",
  input_schema: { type: "object", properties: { city: { enum: ["Paris", "Rome"] } }, required: ["city"] },
}];
const tool_choice = { type: "any", disable_parallel_tool_use: true };
const called = await client.messages.create({ ...ask, max_tokens: 200, tools, tool_choice });
assert.equal(called.stop_reason, "tool_use");
assert.ok(["Paris", "Rome"].includes(called.content.find((c) => c.type === "tool_use").input.city));
const { model, messages } = ask;
assert.ok((await client.messages.countTokens({ model, messages })).input_tokens > 5);
