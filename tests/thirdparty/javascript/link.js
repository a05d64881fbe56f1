// One connection under one key, and the answers that wait on it. kernel/PROTOCOL.md, 'The life of an instance', 2 and 3.

import { randomBytes } from 'node:crypto';

import { connect, headers, jwtAuthenticator } from '@nats-io/transport-node';
import { createUser } from '@nats-io/nkeys';

import { Fault } from './faults.js';

const encoder = new TextEncoder();

export const random = (bytes) => randomBytes(bytes).toString('hex');
export const later = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** A fresh nkey: its seed never leaves this process. */
export function newKey() {
  const pair = createUser();
  return { seed: pair.getSeed(), publicKey: pair.getPublicKey() };
}

export class Link {
  static async open(url, user, jwt, seed) {
    const link = new Link();
    link.inbox = `_INBOX.${user}.${random(16)}`; // nobody else may listen below _INBOX.<user>.
    link.waiting = new Map(); // token of a request -> what becomes of its answer
    link.connection = await connect({
      servers: url, name: user, authenticator: jwtAuthenticator(jwt, seed), maxReconnectAttempts: -1, reconnectTimeWait: 250,
    });
    link.connection.subscribe(`${link.inbox}.*`, { callback: (_, message) => link.#answered(message) });
    return link;
  }

  #answered(message) {
    const token = message.subject.slice(this.inbox.length + 1);
    const resolve = this.waiting.get(token);
    this.waiting.delete(token);
    resolve?.(message);
  }

  /** Publish with a reply subject of its own; the one answer. Fault `timeout`, or `no_responders`, both worth another try. */
  async request(subject, body, timeoutMs, head = {}) {
    const token = random(8); // who is asked learns the inbox: no request in it has a name that can be guessed
    const answer = new Promise((resolve) => this.waiting.set(token, resolve));
    const late = later(timeoutMs).then(() => null);
    try {
      this.publish(subject, body, head, `${this.inbox}.${token}`);
      const message = await Promise.race([answer, late]);
      if (message === null) throw new Fault('kernel', 'timeout', `${subject}: no answer`, 'try again', { retriable: true });
      if (message.headers?.code === 503) {
        throw new Fault('kernel', 'no_responders', `${subject}: nobody serves it`, 'try again', { retriable: true });
      }
      return message;
    } finally {
      this.waiting.delete(token);
    }
  }

  publish(subject, body, head = {}, reply = undefined) {
    const packed = headers();
    for (const [name, value] of Object.entries(head)) packed.set(name, String(value));
    const data = body instanceof Uint8Array ? body : encoder.encode(JSON.stringify(body));
    this.connection.publish(subject, data, { reply, headers: Object.keys(head).length ? packed : undefined });
  }

  /** Close when what waits here for answers has them, or after a time. */
  async retire(timeoutMs) {
    for (const end = Date.now() + timeoutMs; this.waiting.size && Date.now() < end; ) await later(50);
    await this.connection.drain();
  }
}

/** Ask until it is answered: for as long as it takes, or `patienceMs`. Faults that another try can't mend are thrown. */
export async function insist(ask, patienceMs, pauseMs = 200) {
  for (const end = Date.now() + patienceMs; ; await later(pauseMs)) {
    try {
      return await ask();
    } catch (error) {
      if (!(error instanceof Fault) || !error.retriable || Date.now() > end) throw error;
    }
  }
}
