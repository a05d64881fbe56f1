// The whole program of an instance: join, serve data/1, leave when asked to.

import { readFileSync } from 'node:fs';

import { DataMethods } from './data.js';
import { Instance } from './instance.js';

// name and version as in kernelm-plugin.toml, which the system reads without running this
const { version } = JSON.parse(readFileSync(new URL('package.json', import.meta.url), 'utf8'));
// the published schema of the contract, which every release of kernelm brings
const schema = JSON.parse(readFileSync(new URL('schemas/data.v1.json', import.meta.url), 'utf8'));

try {
  const instance = await Instance.join(process.env, { name: 'data-javascript', version, maxJobs: 1 });
  for (const signal of ['SIGTERM', 'SIGINT']) process.on(signal, () => instance.stop());
  instance.offer(schema, new DataMethods(instance));
  process.exitCode = await instance.live();
} catch (error) {
  console.error(error.stack ?? error);
  process.exitCode = 1;
}
process.exit();
