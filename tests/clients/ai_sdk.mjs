// The AI SDK with its provider for servers of OpenAI's kind: text, a stream, an object, a tool.
import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamText, tool } from "ai";
import { z } from "zod";

const provider = createOpenAICompatible({
  name: "edgemoe", baseURL: `${process.argv[2]}/v1`, includeUsage: true, supportsStructuredOutputs: true,
});
const ask = { model: provider("demo"), prompt: "What is the capital of France?", temperature: 0, maxRetries: 0 };
const whole = await generateText({ ...ask, maxOutputTokens: 24 });
assert.match(whole.text, /Paris/);
assert.ok(whole.usage.inputTokens > 5);
const streamed = streamText({ ...ask, maxOutputTokens: 24, onError: ({ error }) => { throw error; } });
let text = "";
for await (const piece of streamed.textStream) text += piece;
assert.equal(text, whole.text);
assert.ok((await streamed.usage).outputTokens > 2);
const made = await generateObject({
  ...ask, schema: z.object({ city: z.enum(["Paris", "Rome"]), isCapital: z.boolean() }),
});
assert.ok(["Paris", "Rome"].includes(made.object.city));
const look = tool({ description: "Looks a city up.", inputSchema: z.object({ city: z.enum(["Paris", "Rome"]) }) });
const called = await generateText({ ...ask, tools: { look }, toolChoice: "required" });
assert.equal(called.toolCalls[0].toolName, "look");
assert.ok(["Paris", "Rome"].includes(called.toolCalls[0].input.city));
