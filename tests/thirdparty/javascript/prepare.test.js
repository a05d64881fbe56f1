// node --test

import assert from 'node:assert/strict';
import { test } from 'node:test';

import { checked, prepareDocuments } from './prepare.js';

const DEFAULTS = {
  format: 'folders', expect_labels: [], max_broken: 0.05, tokenize: { tokenizer: '', max_tokens: 256 },
  clean: { fix_mojibake: true, normalize: 'NFC', drop_control: true, collapse_whitespace: true, min_characters: 20 },
  deduplicate: { exact: true, near: true, jaccard: 0.8, permutations: 128 }, split: { validation: 0.1, test: 0.2, seed: 0 },
};
const quiet = async () => undefined;
const words = (n, k = 0) => Array.from({ length: 20 }, (_, j) => `word${(n * 37 + j * (7 + k)) % 997}`).join(' ');

function source(...texts) {
  const documents = texts.map((text, n) => ({ id: `a/${n}.txt`, label: 0, bytes: typeof text === 'string' ? Buffer.from(text) : text }));
  return { labels: ['a'], documents };
}

const only = async (text, changes = {}) => {
  const made = await prepareDocuments(source(text), { ...DEFAULTS, max_broken: 1, ...changes }, quiet);
  return made.documents[0].text;
};

test('texts are mended, decoded and cleaned', async () => {
  assert.equal(await only('The cafÃ© was â€œopenâ€\u009d all day long'), 'The café was “open” all day long');
  const cp1252 = Buffer.from('The caf\u00e9 was \u0093open\u0094 all day long', 'latin1');
  assert.equal(await only(cp1252), 'The café was “open” all day long');
  assert.equal(await only('SÃO PAULO is a city of many people'), 'SÃO PAULO is a city of many people'); // no mojibake
  assert.equal(await only('e\u0301clair \t\n with\u0007out end, and more'), 'éclair without end, and more');
});

test('each document is kept or accounted for', async () => {
  const texts = [words(1), words(1).toUpperCase(), `${words(1)} and`, 'short', words(2), Buffer.from([65, 0, 66])];
  const { documents, steps } = await prepareDocuments(source(...texts), { ...DEFAULTS, max_broken: 0.5 }, quiet);
  assert.deepEqual(documents.map((d) => d.id), ['a/0.txt', 'a/4.txt']);
  assert.deepEqual(steps.map((s) => [s.name, s.documents_in, s.documents_out]),
    [['read', 6, 5], ['clean', 5, 4], ['exact duplicates', 4, 3], ['near duplicates', 3, 2]]);
  for (const step of steps) {
    assert.equal(step.documents_in - step.documents_out, Object.values(step.reasons).reduce((a, b) => a + b, 0));
  }
});

test('splits are stratified, and copies stay together when they are kept', async () => {
  const texts = Array.from({ length: 200 }, (_, n) => words(n >> 1, n >> 1)); // each text twice
  const labels = ['a', 'b'];
  const documents = source(...texts).documents.map((d, n) => ({ ...d, label: n < 150 ? 0 : 1 }));
  const rules = { ...DEFAULTS, deduplicate: { exact: false, near: false, jaccard: 0.8 } };
  const made = await prepareDocuments({ labels, documents }, rules, quiet);
  assert.equal(made.documents.length, 200);
  const splitOf = new Map();
  for (const d of made.documents) assert.equal(splitOf.get(d.text) ?? d.split, (splitOf.set(d.text, d.split), d.split));
  for (const [label, size] of [[0, 150], [1, 50]]) {
    const count = (split) => made.documents.filter((d) => d.label === label && d.split === split).length;
    assert.ok(Math.abs(count('validation') - 0.1 * size) <= 2);
    assert.ok(Math.abs(count('test') - 0.2 * size) <= 2);
  }
  const again = await prepareDocuments({ labels, documents }, rules, quiet);
  assert.deepEqual(again.documents, made.documents);
});

test('what it can not do is refused by name', async () => {
  for (const [changes, text] of [
    [{ format: 'csv' }, 'format'], [{ tokenize: { tokenizer: 'sha256:0' } }, 'tokenizer'], [{ max_broken: 2 }, 'max_broken'],
    [{ split: { validation: 0.5, test: 0.6, seed: 0 } }, 'split'], [{ clean: { ...DEFAULTS.clean, normalize: 'X' } }, 'normalize'],
    [{ deduplicate: { ...DEFAULTS.deduplicate, jaccard: 9 } }, 'jaccard'],
  ]) assert.throws(() => checked({ ...DEFAULTS, ...changes }), (f) => f.whose === 'client' && f.message.includes(text) && f.remedy !== '');
  const broken = source(words(1), Buffer.from([0]));
  await assert.rejects(prepareDocuments(broken, DEFAULTS, quiet), (f) => f.code === 'too_many_broken');
  await assert.rejects(prepareDocuments(source('short'), DEFAULTS, quiet), (f) => f.code === 'empty');
});
