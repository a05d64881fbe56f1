// A client of a model in JavaScript, over NATS: no SDK of kernelm is needed.
//
//   kernelm key create acme --models news --nats acme.creds
//   npm install && node client.mjs nats://127.0.0.1:4222 acme.creds news "The striker scored twice."
//
// The broker lets a client publish `model.<name>.<method>.<user>` for what its key grants, and listen below `_INBOX.<user>` alone;
// the user's name is in the JWT.

import { readFile } from 'node:fs/promises';

import { connect, credsAuthenticator } from '@nats-io/transport-node';

const [url, file, model, text] = process.argv.slice(2);
const creds = await readFile(file);
const jwt = creds.toString().match(/BEGIN NATS USER JWT-+\s+(\S+)/)[1];
const { name: user } = JSON.parse(Buffer.from(jwt.split('.')[1], 'base64url'));

const nats = await connect({ servers: url, authenticator: credsAuthenticator(creds), inboxPrefix: `_INBOX.${user}` });
const denied = (async () => { // the broker says so on the connection, and not to the call
  for await (const status of nats.status()) if (status.type === 'error') throw status.error;
})();
const call = nats.request(`model.${model}.classify.${user}`, JSON.stringify({ input: [text], top: 1 }), { timeout: 30_000 });
const answer = await Promise.race([call, denied]).catch((error) => {
  console.error(error.message);
  process.exit(1);
});
if (answer.headers?.get('Nats-Service-Error-Code')) {
  const { code, message, remedy } = answer.json(); // a fault: whose, what, and what to do about it
  console.error(`${code}: ${message}${remedy ? `; ${remedy}` : ''}`);
  process.exitCode = 1;
} else {
  const { results, generation } = answer.json();
  console.log(`${results[0][0].label} ${results[0][0].score.toFixed(4)} (${model}, generation ${generation})`);
}
await nats.drain();
