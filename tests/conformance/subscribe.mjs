// Runs one operation through an official client: node subscribe.mjs ws|sse URL '{"query", "variables", "take"}'.
// Prints each result as a line of JSON. After `take` results it leaves as an application would: by ending the iteration.
import { createClient as createSse } from 'graphql-sse';
import { createClient as createWs } from 'graphql-ws';

const [transport, url, request] = process.argv.slice(2);
const { take = Infinity, headers, connectionParams, ...operation } = JSON.parse(request);
const client =
  transport === 'ws'
    ? createWs({ url: url.replace(/^http/, 'ws'), connectionParams, retryAttempts: 0 })
    : createSse({ url, headers, retryAttempts: 0 });

let seen = 0;
try {
  for await (const result of client.iterate(operation)) {
    console.log(JSON.stringify(result));
    seen += 1;
    if (seen >= take) break;
  }
} catch (failure) {
  // graphql-ws throws the errors of a refused operation as an array, and a closed socket as its close event.
  const refused = Array.isArray(failure) ? { errors: failure } : { code: failure.code, message: failure.message };
  console.log(JSON.stringify({ refused }));
}
await client.dispose();
