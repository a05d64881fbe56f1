// A dataset as the contract data/1 lays it out: dataset.json, a table for each split, labels.json, card.md.

import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';

import { parquetWriteBuffer } from 'hyparquet-writer';

export const SPLITS = ['train', 'validation', 'test'];
const SCHEMA = [
  { name: 'root', num_children: 4 },
  { name: 'id', type: 'BYTE_ARRAY', converted_type: 'UTF8', repetition_type: 'REQUIRED' },
  { name: 'text', type: 'BYTE_ARRAY', converted_type: 'UTF8', repetition_type: 'REQUIRED' },
  { name: 'label', type: 'INT32', repetition_type: 'REQUIRED' },
  { name: 'input_ids', repetition_type: 'OPTIONAL', num_children: 1, converted_type: 'LIST' },
  { name: 'list', repetition_type: 'REPEATED', num_children: 1 },
  { name: 'element', type: 'INT32', repetition_type: 'OPTIONAL' },
];

/** Writes the files into `folder`; the card. */
export async function writeDataset(folder, { labels, documents, steps }, request) {
  const splits = {};
  for (const name of SPLITS) {
    const rows = documents.filter((d) => d.split === name);
    const column = (key, of) => ({ name: key, data: rows.map(of) });
    const columnData = [
      column('id', (d) => d.id), column('text', (d) => d.text), column('label', (d) => d.label), column('input_ids', () => []),
    ];
    await writeFile(join(folder, `${name}.parquet`), Buffer.from(parquetWriteBuffer({ schema: SCHEMA, columnData })));
    splits[name] = { documents: rows.length, tokens: 0, per_label: perLabel(rows, labels) };
  }
  const lengths = documents.map((d) => [...d.text].length).sort((a, b) => a - b);
  const quantile = (share) => lengths[Math.min(Math.floor(share * lengths.length), lengths.length - 1)];
  const characters = { p5: quantile(0.05), p50: quantile(0.5), p95: quantile(0.95) };
  const { name, source } = request;
  const card = { name, labels, steps, splits, max_tokens: request.tokenize.max_tokens, tokenizer: '', characters, source };
  await writeFile(join(folder, 'dataset.json'), JSON.stringify(card));
  await writeFile(join(folder, 'labels.json'), JSON.stringify(labels));
  await writeFile(join(folder, 'card.md'), markdown(card));
  return card;
}

function perLabel(rows, labels) {
  return Object.fromEntries(labels.map((label, index) => [label, rows.filter((d) => d.label === index).length]));
}

function markdown({ name, labels, steps, splits }) {
  const row = (cells) => `| ${cells.join(' | ')} |`;
  return [
    `# ${name}`, '', row(['split', 'documents', ...labels]), row(['---', '---', ...labels.map(() => '---')]),
    ...SPLITS.map((s) => row([s, splits[s].documents, ...labels.map((l) => splits[s].per_label[l])])), '',
    row(['step', 'in', 'out', 'why']), row(['---', '---', '---', '---']),
    ...steps.map((s) => row([s.name, s.documents_in, s.documents_out,
      Object.entries(s.reasons).map(([why, n]) => `${n} ${why}`).join(', ')])), '',
  ].join('\n');
}
