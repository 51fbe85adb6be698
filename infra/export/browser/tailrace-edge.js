// Ranks candidates in the browser as the server does: same graph, same rows, same gaps between events.
//
//   import { Ranker } from "./tailrace-edge.js";
//   const ranker = await Ranker.load("https://shop.example/edge/");
//   const history = [{ item_id: 9087, category_id: 185, behavior: "pv", timestamp: 1511600000 }];
//   const list = await ranker.rank(history, [3361, 14062]);   // [{ item_id, score }], best first
//
// The folder of `load` is what `tailrace export edge` wrote. Every file is compared with the manifest's size
// and SHA-256 before it is used, the runtime's own code too; `sha256` of the manifest may be given. A page
// with a Content-Security-Policy must allow `script-src blob: 'wasm-unsafe-eval'`.

const MANIFEST = "manifest.json";
const MAX_MANIFEST_BYTES = 1 << 20;
const MAX_ID = 2n ** 63n - 1n;
const ARRAYS = { uint16: Uint16Array, uint32: Uint32Array, int64: BigInt64Array };

// The folder, or the ask, is not what it should be; the message says why.
export class EdgeError extends Error {}

export class Ranker {
  #session;
  #tensor;
  #words;
  #last = Promise.resolve();

  // Milliseconds that loading took: fetching and checking, then compiling.
  loaded_ms = { files: 0, session: 0 };

  constructor(manifest, session, tensor, words) {
    this.manifest = manifest;
    this.#session = session;
    this.#tensor = tensor;
    this.#words = words;
  }

  static async load(url, { sha256 } = {}) {
    const started = performance.now();
    const folder = new URL(url.endsWith("/") ? url : `${url}/`, globalThis.location?.href);
    const manifest = await readManifest(folder, sha256);
    const { runtime, vocabulary } = manifest;
    const names = [manifest.graph, vocabulary.file, runtime.loader, runtime.wasm];
    const [graph, words, loader, wasm] = await Promise.all(names.map((name) => readFile(folder, manifest, name)));
    const fetched = performance.now();
    const ort = await importBytes(loader);
    ort.env.wasm.wasmBinary = wasm.buffer;
    ort.env.wasm.numThreads = 1;
    const session = await ort.InferenceSession.create(graph, { executionProviders: ["wasm"] });
    const tensor = (rows, shape) => new ort.Tensor("int32", rows, shape);
    const ranker = new Ranker(manifest, session, tensor, new Vocabulary(vocabulary, words));
    ranker.loaded_ms = { files: fetched - started, session: performance.now() - fetched };
    return ranker;
  }

  // Ids of the items this folder knows, ascending. Any other item has the row of its hash bucket.
  get items() {
    return this.#words.item_ids;
  }

  // The category of a known item; undefined where the item or its category is not known.
  categoryOf(item_id) {
    return this.#words.categoryOf(item_id);
  }

  // Scores of the candidates, each once, best first; equal ones in the order given. `history` is oldest
  // first: { item_id, category_id, behavior: "pv" | "cart" | "fav" | "buy", timestamp in Unix seconds }.
  async rank(history, candidates) {
    const asked = [...new Set(candidates.map(asId))];
    if (asked.length === 0) return [];
    const inputs = this.#inputs(history, asked);
    // The runtime runs one thing at a time: whoever asks meanwhile waits.
    const answer = this.#last.then(() => this.#session.run(inputs, ["scores"]));
    this.#last = answer.catch(() => undefined);
    const scores = (await answer).scores.data;
    if (!scores.every(Number.isFinite)) throw new EdgeError("the graph answers with numbers that are not finite");
    return asked
      .map((item, place) => ({ item_id: asGiven(item), score: scores[place] }))
      .sort((one, other) => other.score - one.score);
  }

  #inputs(history, asked) {
    const { max_history, history_hop = 0, behaviors } = this.manifest;
    const events = fromAnchor(history.slice(-max_history), max_history, history_hop);
    const slots = Math.max(1, events.length);
    const row = () => new Int32Array(slots);
    const columns = { items: row(), categories: row(), behaviors: row(), gaps: row() };
    events.forEach((event, slot) => {
      columns.items[slot] = this.#words.itemRow(asId(event.item_id));
      columns.categories[slot] = this.#words.categoryRow(asId(event.category_id));
      columns.behaviors[slot] = 1 + indexOf(behaviors, event.behavior);
      const before = slot === 0 ? null : asTime(events[slot - 1].timestamp);
      columns.gaps[slot] = gapBucket(before, asTime(event.timestamp));
    });
    const inputs = { lengths: this.#tensor(Int32Array.of(events.length), [1]) };
    for (const [name, rows] of Object.entries(columns)) inputs[name] = this.#tensor(rows, [1, slots]);
    const shape = [1, asked.length];
    const rows = Int32Array.from(asked, (item) => this.#words.itemRow(item));
    inputs.candidates = this.#tensor(rows, shape);
    inputs.candidate_categories = this.#tensor(rows.map((at) => this.#words.categoryRowOfItemRow(at)), shape);
    return inputs;
  }
}

// Rows of the tables: 0 is padding, then known ids in ascending order, then hash buckets for the others.
class Vocabulary {
  constructor(described, bytes) {
    for (const [name, { type, offset, length }] of Object.entries(described.arrays)) {
      this[name] = new ARRAYS[type](bytes.buffer, offset, length);
    }
    this.itemBuckets = BigInt(described.item_buckets);
    this.categoryBuckets = BigInt(described.category_buckets);
    this.unknownCategory = 1 + this.category_ids.length;
  }

  itemRow(id) {
    const place = find(this.item_ids, id);
    return place >= 0 ? 1 + place : 1 + this.item_ids.length + Number(mix(id) % this.itemBuckets);
  }

  // The first category bucket is that of items whose category nobody knows.
  categoryRow(id) {
    const place = find(this.category_ids, id);
    return place >= 0 ? 1 + place : this.unknownCategory + 1 + Number(mix(id) % (this.categoryBuckets - 1n));
  }

  categoryRowOfItemRow(row) {
    return this.item_categories[row - 1] ?? this.unknownCategory;
  }

  categoryOf(id) {
    const place = find(this.item_ids, asId(id));
    return place < 0 ? undefined : this.category_ids[this.item_categories[place] - 1];
  }
}

// The place of an id among ascending ones, -1 where it is not there.
function find(ascending, id) {
  let low = 0;
  let high = ascending.length;
  while (low < high) {
    const middle = (low + high) >>> 1;
    if (ascending[middle] < id) low = middle + 1;
    else high = middle;
  }
  return low < ascending.length && BigInt(ascending[low]) === id ? low : -1;
}

// splitmix64's finaliser, top bit dropped: the bucket of an unknown id is the same everywhere.
function mix(id) {
  const u64 = (x) => BigInt.asUintN(64, x);
  let x = u64(id + 0x9e3779b97f4a7c15n);
  x = u64((x ^ (x >> 30n)) * 0xbf58476d1ce4e5b9n);
  x = u64((x ^ (x >> 27n)) * 0x94d049bb133111ebn);
  return (x ^ (x >> 31n)) >> 1n;
}

// A full history starts at the event with the lowest hash among the oldest `hop` + 1, as the server's does.
function fromAnchor(events, longest, hop) {
  if (hop === 0 || events.length < longest) return events;
  let start = 0;
  let lowest = null;
  events.slice(0, hop + 1).forEach((event, place) => {
    const hash = hashOf(asId(event.item_id), BigInt(asTime(event.timestamp)));
    if (lowest === null || hash < lowest) [start, lowest] = [place, hash];
  });
  return events.slice(start);
}

function hashOf(item, timestamp) {
  const u64 = (x) => BigInt.asUintN(64, x);
  let x = u64(item * 0x9e3779b97f4a7c15n);
  x = u64((x ^ (x >> 29n)) + timestamp);
  x = u64(x * 0xc2b2ae3d27d4eb4fn);
  return x ^ (x >> 29n);
}

// 1 + floor(log2(1 + gap)), at most 31; 0 for the first event. A clock that ran backwards is no gap.
function gapBucket(before_s, now_s) {
  if (before_s === null) return 0;
  const gap = Math.max(0, now_s - before_s);
  return gap >= 2 ** 30 ? 31 : 32 - Math.clz32(gap + 1);
}

function asId(id) {
  const whole = typeof id === "bigint" || Number.isSafeInteger(id);
  if (!whole || id < 0 || id > MAX_ID) throw new EdgeError(`${id} is not an id: a whole number from 0 to 2^63 - 1`);
  return BigInt(id);
}

// Beyond 2^53 a number is not exact, and ids stay big.
function asGiven(id) {
  return id <= Number.MAX_SAFE_INTEGER ? Number(id) : id;
}

function asTime(timestamp) {
  if (!Number.isSafeInteger(timestamp)) throw new EdgeError(`${timestamp} is not a time in Unix seconds`);
  return timestamp;
}

function indexOf(behaviors, behavior) {
  const place = behaviors.indexOf(behavior);
  if (place < 0) throw new EdgeError(`${behavior} is not one of ${behaviors.join(", ")}`);
  return place;
}

async function readManifest(folder, sha256) {
  const bytes = await fetchBytes(new URL(MANIFEST, folder), MANIFEST, MAX_MANIFEST_BYTES);
  if (sha256 !== undefined) await check(bytes, MANIFEST, sha256);
  let manifest;
  try {
    manifest = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
  } catch {
    throw new EdgeError(`${MANIFEST} is damaged`);
  }
  if (manifest?.schema !== 1) throw new EdgeError(`${MANIFEST} is of a kind that this code does not know`);
  return manifest;
}

async function readFile(folder, manifest, name) {
  const entry = manifest.files[name];
  if (entry === undefined) throw new EdgeError(`the manifest names no file ${name}`);
  const bytes = await fetchBytes(new URL(name, folder), name, entry.bytes);
  if (bytes.length !== entry.bytes) throw new EdgeError(`${name} has ${bytes.length} bytes, not ${entry.bytes}`);
  await check(bytes, name, entry.sha256);
  return bytes;
}

async function check(bytes, name, sha256) {
  if (crypto.subtle === undefined) throw new EdgeError("files can only be checked on https or localhost");
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  const found = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
  if (found !== sha256) throw new EdgeError(`${name} is not the file that was exported: its SHA-256 differs`);
}

// All of a file, given up as soon as it is longer than it may be.
async function fetchBytes(url, name, limit) {
  let answer;
  try {
    answer = await fetch(url);
  } catch {
    throw new EdgeError(`${name} cannot be fetched`);
  }
  if (!answer.ok) throw new EdgeError(`${name} cannot be fetched: ${answer.status}`);
  const bytes = new Uint8Array(limit);
  const reader = answer.body.getReader();
  let size = 0;
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    if (size + part.value.length > limit) {
      await reader.cancel();
      throw new EdgeError(`${name} has more than ${limit} bytes`);
    }
    bytes.set(part.value, size);
    size += part.value.length;
  }
  return size === limit ? bytes : bytes.slice(0, size);
}

// The bytes that were checked are the code that runs: fetching it again could bring others.
async function importBytes(bytes) {
  const url = URL.createObjectURL(new Blob([bytes], { type: "text/javascript" }));
  try {
    return await import(url);
  } finally {
    URL.revokeObjectURL(url);
  }
}
