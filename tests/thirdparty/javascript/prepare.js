// From bytes to documents that are clean, no two of them alike, and split. Pure: no bus, no files, the same for the same input.

import { createHash } from 'node:crypto';

import { Fault } from './faults.js';

const EXAMPLES = 5; // ids of dropped documents that the account names
const PAUSE = 200; // documents between two steps of the work
const MOJIBAKE = /[\u00c2\u00c3\u00e2][\u0080-\u00bf\u0152-\u0178\u02c6\u02dc\u2013-\u203a\u20ac\u2122]/; // UTF-8 read as cp1252
const CONTROL = /[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\ufeff]/g;
const FORMS = ['', 'NFC', 'NFD', 'NFKC', 'NFKD'];
const utf8 = new TextDecoder('utf-8', { fatal: true });
// cp1252 by hand: Node.js 20 takes "windows-1252" for Latin-1, which differs from 0x80 to 0x9f
const CP1252 = '€\u0081‚ƒ„…†‡ˆ‰Š‹Œ\u008dŽ\u008f\u0090‘’“”•–—˜™š›œ\u009džŸ';
const cp1252 = (bytes) => Buffer.from(bytes).toString('latin1').replace(/[\u0080-\u009f]/g, (c) => CP1252[c.charCodeAt(0) - 0x80]);
const CP1252_BYTES = new Map(Array.from({ length: 256 }, (_, byte) => [cp1252([byte]), byte]));

/** Refuses a request that this plugin can't do, before any work. */
export function checked({ format, clean, deduplicate, split, tokenize, max_broken: maxBroken }) {
  const within = (value, low, high) => value >= low && value <= high;
  const wrong = (what, remedy) => Fault.client('invalid', `prepare: ${what}`, remedy);
  if (format !== 'folders') throw wrong(`format is ${JSON.stringify(format)}`, 'this plugin reads "folders"');
  if (tokenize.tokenizer) throw wrong('tokenize.tokenizer is set', 'this plugin makes no token ids: leave it ""');
  if (!FORMS.includes(clean.normalize)) throw wrong('clean.normalize is no Unicode form', FORMS.join(' '));
  if (!within(deduplicate.jaccard, 0.01, 1)) throw wrong('deduplicate.jaccard is not within 0.01 to 1', 'e.g. 0.8');
  if (!within(maxBroken, 0, 1)) throw wrong('max_broken is no share', '0 to 1');
  const shares = [split.validation, split.test, split.validation + split.test];
  if (!shares.every((s) => within(s, 0, 0.9))) throw wrong('split: shares must be 0 or more, at most 0.9 together', 'e.g. 0.1 and 0.2');
}

/** {labels, documents: [{id, label, text, split}], steps}; `tell(fraction, phase, message)` may end the work by throwing. */
export async function prepareDocuments({ labels, documents: files }, request, tell) {
  const { clean, deduplicate, expect_labels: expected } = request;
  if (expected.length && [...expected].sort().join('\n') !== labels.join('\n')) {
    const found = `the source has the classes ${labels.join(', ') || 'none'}`;
    throw Fault.client('unexpected_labels', `${found}; expect_labels names ${expected.join(', ')}`, 'correct one of them');
  }
  const account = new Account(files.length);
  let documents = await account.step('read', files, tell, 0.4, (file, step) => decoded(file, step));
  const broken = files.length - documents.length;
  if (broken > request.max_broken * files.length) {
    throw Fault.client('too_many_broken', `${broken} of ${files.length} documents are unreadable`, 'correct the source, or max_broken');
  }
  documents = await account.step('clean', documents, tell, 0.5, (document, step) => cleaned(document, step, clean));
  const exact = new Set();
  documents = await account.step('exact duplicates', documents, tell, 0.6, (document, step) => {
    const key = wordsOf(document.text).join(' ');
    if (deduplicate.exact && exact.has(key)) return step.drop(document, 'the same words as another');
    exact.add(key);
    return document;
  });
  const near = new NearDuplicates(deduplicate.jaccard);
  documents = await account.step('near duplicates', documents, tell, 0.8, (document, step) =>
    deduplicate.near && !near.add(wordsOf(document.text)) ? step.drop(document, 'nearly the words of another') : document);
  if (!documents.length) throw Fault.client('empty', 'no document is left', `see the steps: ${JSON.stringify(account.steps)}`);
  splitDocuments(documents, request.split);
  return { labels, documents, steps: account.steps };
}

/** What went into each step, what came out, and why the rest did not. */
class Account {
  steps = [];

  constructor(total) {
    this.total = total;
  }

  async step(name, documents, tell, fraction, change) {
    const step = { name, documents_in: documents.length, documents_out: 0, reasons: {}, examples: [], changed: {} };
    const count = (where, what) => (where[what] = (where[what] ?? 0) + 1);
    const hand = {
      drop(document, reason) {
        count(step.reasons, reason);
        if (step.examples.length < EXAMPLES) step.examples.push(document.id);
        return null;
      },
      note: (what) => count(step.changed, what),
    };
    const left = [];
    for (const [index, document] of documents.entries()) {
      if (index % PAUSE === 0) await tell(fraction, name, `${index} of ${documents.length} documents`);
      const found = change(document, hand);
      if (found) left.push(found);
    }
    step.documents_out = left.length;
    this.steps.push(step);
    return left;
  }
}

function decoded({ id, label, bytes }, step) {
  if (bytes.includes(0)) return step.drop({ id }, 'not a text');
  try {
    return { id, label, text: utf8.decode(bytes) };
  } catch {
    step.note('decoded from cp1252');
    return { id, label, text: cp1252(bytes) };
  }
}

function cleaned(document, step, rules) {
  let { text } = document;
  const apply = (what, change) => {
    const after = change(text);
    if (after !== text) step.note(what);
    text = after;
  };
  if (rules.fix_mojibake) apply('mojibake mended', mended);
  if (rules.normalize) apply(`normalized to ${rules.normalize}`, (t) => t.normalize(rules.normalize));
  if (rules.drop_control) apply('control characters dropped', (t) => t.replace(CONTROL, ''));
  if (rules.collapse_whitespace) apply('whitespace collapsed', (t) => t.replace(/\s+/gu, ' ').trim());
  if ([...text].length < rules.min_characters) return step.drop(document, `shorter than ${rules.min_characters} characters`);
  return { ...document, text };
}

/** UTF-8 that somebody has read as cp1252, read again; a text that is none stays as it is. */
function mended(text) {
  if (!MOJIBAKE.test(text)) return text;
  const bytes = [...text].map((character) => CP1252_BYTES.get(character));
  if (bytes.includes(undefined)) return text;
  try {
    return utf8.decode(Uint8Array.from(bytes));
  } catch {
    return text;
  }
}

function wordsOf(text) {
  return text.toLowerCase().match(/[\p{L}\p{N}\p{M}_]+/gu) ?? [];
}

/** Finds documents whose sets of word 5-grams have a Jaccard similarity of at least `jaccard`, exactly, by an inverted index. */
class NearDuplicates {
  constructor(jaccard) {
    Object.assign(this, { jaccard, sizes: [], places: new Map() });
  }

  /** Take up a document, given as its words; false, and it is not taken up, if it is a near duplicate of one before. */
  add(words) {
    const grams = new Set();
    for (let k = 0; k < Math.max(words.length - 4, 1); k++) grams.add(words.slice(k, k + 5).join(' '));
    const shared = new Map(); // an earlier document -> 5-grams in common
    for (const gram of grams) for (const other of this.places.get(gram) ?? []) shared.set(other, (shared.get(other) ?? 0) + 1);
    for (const [other, common] of shared) {
      if (common >= this.jaccard * (grams.size + this.sizes[other] - common)) return false;
    }
    const mine = this.sizes.push(grams.size) - 1;
    for (const gram of grams) this.places.set(gram, [...(this.places.get(gram) ?? []), mine]);
    return true;
  }
}

/** Sets `split`: of each class its share, in the order of a hash, with documents of the same words always together. */
function splitDocuments(documents, { validation, test, seed }) {
  const groups = new Map(); // words -> documents
  for (const document of documents) {
    const key = wordsOf(document.text).join(' ');
    groups.set(key, [...(groups.get(key) ?? []), document]);
  }
  const hashed = [...groups].map(([key, group]) => [createHash('sha256').update(`${seed}\n${key}`).digest('hex'), group]);
  hashed.sort(([a], [b]) => (a < b ? -1 : 1));
  for (const label of new Set(documents.map((d) => d.label))) {
    const mine = hashed.map(([, group]) => group).filter(([first]) => first.label === label);
    const size = mine.reduce((sum, group) => sum + group.length, 0);
    let before = 0;
    for (const group of mine) {
      const place = before / size;
      const split = place < validation ? 'validation' : place < validation + test ? 'test' : 'train';
      for (const document of group) document.split = split;
      before += group.length;
    }
  }
}
