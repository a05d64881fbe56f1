// The methods of data/1. Effects only; what is done to the texts is in prepare.js.

import { mkdir, readFile, readdir } from 'node:fs/promises';
import { join } from 'node:path';

import { writeDataset } from './dataset.js';
import { Fault } from './faults.js';
import { checked, prepareDocuments } from './prepare.js';

const OPEN_MS = 300_000;

export class DataMethods {
  fields = { prepare: ['source', 'format', 'name', 'expect_labels', 'max_broken', 'clean', 'deduplicate', 'split', 'tokenize'] };

  constructor(instance) {
    this.instance = instance;
  }

  /** Job: a folder of texts becomes a dataset in the store. */
  async prepare(request, job) {
    checked(request);
    const source = await this.instance.call('artifacts/1', 'open', { digest: request.source }, OPEN_MS);
    const files = await readFolders(source.path, job);
    const dataset = await prepareDocuments(files, request, (...progress) => job.step(...progress));
    const folder = join(job.scratch, 'dataset');
    await mkdir(folder);
    const card = await writeDataset(folder, dataset, request);
    await job.step(0.95, 'store');
    const documents = dataset.documents.length;
    const stored = await this.instance.call('artifacts/1', 'put', {
      path: folder, kind: 'dataset', lineage: { job: job.id, source: request.source },
      metadata: { name: card.name, documents, labels: card.labels },
    }, OPEN_MS);
    await job.step(1, 'store');
    await this.instance.publish('dataset.prepared', { name: card.name, dataset: stored.digest, documents });
    const splits = Object.fromEntries(Object.entries(card.splits).map(([name, split]) => [name, split.documents]));
    return { dataset: stored.digest, documents, labels: card.labels, splits, card };
  }

  /** The card of a stored dataset. */
  async describe({ digest }) {
    const { path } = await this.instance.call('artifacts/1', 'open', { digest }, OPEN_MS);
    try {
      return JSON.parse(await readFile(join(path, 'dataset.json'), 'utf8'));
    } catch (error) {
      throw Fault.client('not_a_dataset', `${digest}: dataset.json: ${error.code ?? error.message}`, 'give the digest of a dataset');
    }
  }
}

/** [{id, label, bytes}] of `<class>/<document>.txt` in the order of their names, and the names of the classes. */
async function readFolders(folder, job) {
  const labels = (await readdir(folder, { withFileTypes: true })).filter((e) => e.isDirectory()).map((e) => e.name).sort();
  const documents = [];
  for (const [index, label] of labels.entries()) {
    const names = (await readdir(join(folder, label))).filter((n) => n.endsWith('.txt')).sort();
    for (const name of names) documents.push({ id: `${label}/${name}`, label: index, bytes: await readFile(join(folder, label, name)) });
    await job.step((0.3 * (index + 1)) / labels.length, 'read', `${documents.length} documents`);
  }
  return { labels, documents };
}
