// Faults: whose, what, why, and what to do about it. kernel/PROTOCOL.md, 'Calls'.

const STATUS = { client: 400, plugin: 502, kernel: 503 };
const STATUS_OF_CODE = { permission_denied: 403, not_found: 404, busy: 429, unsupported_method: 501, timeout: 504 };

const FULL = ['ENOSPC', 'EDQUOT'];

export class Fault extends Error {
  constructor(whose, code, message, remedy = '', { retriable = false, details = {} } = {}) {
    super(message);
    Object.assign(this, { whose, code, remedy, retriable, details });
  }

  static client(code, message, remedy, more) {
    return new Fault('client', code, message, remedy, more);
  }

  /** The fault in an answer of the system; null for a result. */
  static of(message) {
    const status = message.headers?.get('Nats-Service-Error-Code');
    if (!status) return null;
    const { whose, code, message: text, remedy, retriable, details } = JSON.parse(new TextDecoder().decode(message.data));
    return new Fault(whose, code, text, remedy, { retriable, details });
  }

  /** What the caller may see of any error: a bug's own text and its stack stay in the log. */
  static from(error, what) {
    if (error instanceof Fault) return error;
    console.error(`${what}:`, error);
    if (FULL.includes(error?.code)) {
      return new Fault('plugin', 'disk_full', 'there was no room for its files on the disk', 'free some room on the disk of that node');
    }
    return new Fault('plugin', 'internal', `${what} failed with ${error?.name ?? 'an error'}`, 'see the log of the instance');
  }

  get status() {
    return STATUS_OF_CODE[this.code] ?? STATUS[this.whose];
  }

  get body() {
    const { whose, code, message, remedy, retriable, details } = this;
    return { whose, code, message, remedy, retriable, details };
  }
}
