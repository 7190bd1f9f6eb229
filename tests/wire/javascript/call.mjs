// Calls the hosted chains with LangChain.js and prints what came of it as JSON. Usage: node call.mjs URL

import { HumanMessage } from "@langchain/core/messages";
import { RemoteRunnable } from "@langchain/core/runnables/remote";

const url = process.argv[2];
const chat = new RemoteRunnable({ url: `${url}/chat` });
const translate = new RemoteRunnable({ url: `${url}/translate` });

const say = (text) => ({ text, target_language: "German" });

// What a stream gave, and the error that ended it, if one did.
async function collect(stream) {
  const chunks = [];
  try {
    for await (const chunk of await stream) chunks.push(chunk);
  } catch (error) {
    return { chunks, error: String(error) };
  }
  return { chunks };
}

async function failure(promise) {
  try {
    return { answer: await promise };
  } catch (error) {
    return { error: String(error) };
  }
}

const message = await chat.invoke({ messages: [new HumanMessage("Hi!")] });
const messages = await collect(chat.stream({ messages: [new HumanMessage("Hi!")] }));
const conversation = { messages: [new HumanMessage("One"), message, new HumanMessage("Two")] };
const log = await collect(translate.streamLog(say("Hi!")));
const events = await collect(translate.streamEvents(say("Hi!"), { version: "v2" }));

const aborting = new AbortController();
const aborted = [];
try {
  for await (const chunk of await translate.stream(say("slow"), { signal: aborting.signal })) {
    aborted.push(chunk);
    aborting.abort();
  }
} catch {
  aborted.push("aborted");
}

console.log(
  JSON.stringify({
    invoke: await translate.invoke(say("Hi!")),
    options: await translate.invoke(say("abcdef"), { configurable: { max_tokens: 3 }, tags: ["a"], metadata: { b: 1 } }),
    batch: await translate.batch([say("one"), say("two")]),
    batchOptions: await translate.batch([say("one"), say("two")], { configurable: { max_tokens: 1 } }, { maxConcurrency: 2 }),
    stream: await collect(translate.stream(say("Hi!"))),
    message: { type: message._getType(), content: message.content },
    messages: messages.chunks.map((chunk) => [chunk._getType(), chunk.content]),
    conversation: (await chat.invoke(conversation)).content,
    log: log.chunks.length,
    events: [...new Set(events.chunks.map((event) => event.event))],
    aborted,
    refused: await failure(translate.invoke(say(""))),
    failed: await failure(translate.invoke(say("fail"))),
    failedStream: await collect(translate.stream(say("fail"))),
    failedEvents: await collect(translate.streamEvents(say("fail"), { version: "v2" })),
  }),
);
