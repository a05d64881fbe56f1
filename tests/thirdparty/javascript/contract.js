// A contract as its published schema describes it: what its methods take, and whether a request fits.

import { isDeepStrictEqual } from 'node:util';

import Ajv from 'ajv/dist/2020.js';

import { Fault } from './faults.js';

const decoder = new TextDecoder('utf-8', { fatal: true });

export class Contract {
  /** `methods`: an object with a function for each method that it has, and in `fields` the fields of a request that it heeds. */
  constructor(schema, methods) {
    this.id = schema.title;
    this.key = schema.title.replace('/', '.v'); // as in subjects
    this.schemaHash = schema.schema_hash;
    this.methods = Object.create(null);
    const ajv = new Ajv({ strict: false, useDefaults: true });
    for (const [name, { kind, request }] of Object.entries(schema.methods)) {
      if (!methods[name]) continue; // younger than this plugin, which then answers `unsupported_method`
      const fits = ajv.compile({ $defs: schema.$defs, ...request });
      const { properties = {} } = request.$ref ? schema.$defs[request.$ref.split('/').pop()] : request;
      const unheeded = Object.keys(properties).filter((field) => methods.fields[name] && !methods.fields[name].includes(field));
      const defaults = unheeded.map((field) => [field, properties[field].default]);
      this.methods[name] = { kind, fits, defaults, run: methods[name].bind(methods) };
    }
  }

  /** The JSON object in a body; a client's fault for anything else. */
  static parse(data) {
    let value;
    try {
      value = JSON.parse(decoder.decode(data));
    } catch (error) {
      throw Fault.client('invalid', `the body is no JSON: ${error.message.slice(0, 100)}`);
    }
    if (value === null || typeof value !== 'object' || Array.isArray(value)) {
      throw Fault.client('invalid', 'the body is no JSON object');
    }
    return value;
  }

  /** The request of a method in a body (or an object), with its defaults. */
  request(method, body) {
    const value = body instanceof Uint8Array ? Contract.parse(body) : body;
    const { fits, defaults } = this.methods[method];
    if (!fits(value)) {
      const [{ instancePath, message, params }] = fits.errors;
      const more = params.additionalProperty ? ` (${JSON.stringify(params.additionalProperty)})` : '';
      throw Fault.client('invalid', `${method}: ${instancePath || 'the request'} ${message}${more}`, `see the schema of ${this.id}`);
    }
    for (const [field, usual] of defaults) { // what it would silently not do
      if (isDeepStrictEqual(value[field], usual)) continue;
      throw Fault.client('invalid', `${method}: this plugin does nothing about \`${field}\``, 'leave it out, or name another plugin');
    }
    return value;
  }
}
