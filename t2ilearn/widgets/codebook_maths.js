// The arithmetic of a vector quantizer, as `t2ilearn.models.quantizers` does it. Points are arrays
// of D numbers; z are n encodings, vectors the K code vectors, tokens the index of each encoding's.

import { sampleIndex } from "./shared.js";

// What the two labs share: the plane that is drawn, and the learning rate of a loss that is a mean.
export const SIDE = 2.4;
export const RATE = 1;

const squared = (a, b) => a.reduce((sum, v, i) => sum + (v - b[i]) ** 2, 0);

// Eq. 1: the nearest code vector; the first of several equally near ones.
export function nearest(z, vectors) {
  return z.map((point) => {
    const distances = vectors.map((vector) => squared(point, vector));
    return distances.indexOf(Math.min(...distances));
  });
}

// Eq. 3 with a decoder that changes nothing: the reconstruction of x is the code vector.
export function lossTerms(x, z, vectors, beta) {
  const tokens = nearest(z, vectors);
  const mean = (from) =>
    from.reduce((sum, point, i) => sum + squared(point, vectors[tokens[i]]), 0) /
    (z.length * z[0].length);
  const [reconstruction, codebook, commitment] = [mean(x), mean(z), mean(z)];
  return { reconstruction, codebook, commitment, total: reconstruction + codebook + beta * commitment };
}

// The gradient of each term at what it may move; β is in the commitment's.
export function termGradients(x, z, vectors, beta) {
  const tokens = nearest(z, vectors);
  const scale = 2 / (z.length * z[0].length); // squares are means over numbers
  const codebook = vectors.map((vector) => vector.map(() => 0));
  tokens.forEach((k, i) => z[i].forEach((v, d) => (codebook[k][d] += scale * (vectors[k][d] - v))));
  const onCode = (from) => from.map((v, d) => scale * (v[0] - v[1]));
  const pairs = (a, b) => a.map((v, d) => [v, b[d]]);
  return {
    tokens,
    reconstruction: tokens.map((k, i) => onCode(pairs(vectors[k], x[i]))), // copied to z
    codebook,
    commitment: tokens.map((k, i) => onCode(pairs(z[i], vectors[k])).map((g) => beta * g)),
  };
}

// One step of plain gradient descent on all three terms.
export function descend(x, z, vectors, beta, rate) {
  const slope = termGradients(x, z, vectors, beta);
  return {
    z: z.map((p, i) =>
      p.map((v, d) => v - rate * (slope.reconstruction[i][d] + slope.commitment[i][d]))),
    vectors: vectors.map((p, k) => p.map((v, d) => v - rate * slope.codebook[k][d])),
  };
}

// The part of a box that is nearer to code vector k than to any other, as a polygon. The
// box is cut by the wall between k and each other vector in turn.
export function cell(vectors, k, [x0, x1], [y0, y1]) {
  let corners = [[x0, y0], [x1, y0], [x1, y1], [x0, y1]];
  vectors.forEach((other, j) => {
    if (squared(other, vectors[k]) === 0) {
      if (j < k) corners = []; // of two vectors in one place the first is chosen
      return;
    }
    const side = (p) => squared(p, other) - squared(p, vectors[k]); // linear in p; ≥ 0 is ours
    corners = corners.flatMap((p, i) => {
      const q = corners[(i + 1) % corners.length];
      const [a, b] = [side(p), side(q)];
      const kept = a >= 0 ? [p] : [];
      if (a * b < 0) kept.push(p.map((v, d) => v + (a / (a - b)) * (q[d] - v)));
      return kept;
    });
  });
  return corners;
}

// --- codebook collapse, and the cures ----------------------------------------------------

function countAndSum(z, tokens, vectors) {
  const counts = vectors.map(() => 0);
  const sums = vectors.map((vector) => vector.map(() => 0));
  tokens.forEach((k, i) => {
    counts[k] += 1;
    z[i].forEach((v, d) => (sums[k][d] += v));
  });
  return { counts, sums };
}

// A codebook with its moving averages: counts N and sums m.
export function newBook(vectors) {
  return { vectors, counts: vectors.map(() => 1), sums: vectors.map((vector) => [...vector]) };
}

// Eqs. 6–8: N ← γ N + (1 − γ) n,  m ← γ m + (1 − γ) Σ z,  e ← m / N, with Laplace smoothing.
export function averageStep(book, z, decay) {
  const seen = countAndSum(z, nearest(z, book.vectors), book.vectors);
  const mix = (old, now) => old + (1 - decay) * (now - old);
  const counts = book.counts.map((n, k) => mix(n, seen.counts[k]));
  const sums = book.sums.map((m, k) => m.map((v, d) => mix(v, seen.sums[k][d])));
  const total = counts.reduce((a, b) => a + b, 0);
  const epsilon = 1e-5;
  const smooth = counts.map((n) => (total * (n + epsilon)) / (total + counts.length * epsilon));
  return { vectors: sums.map((m, k) => m.map((v) => v / smooth[k])), counts, sums };
}

// The codebook term by gradient; the running counts only tell which codes are dead.
export function gradientStep(book, z, decay, rate) {
  const tokens = nearest(z, book.vectors);
  const seen = countAndSum(z, tokens, book.vectors);
  const counts = book.counts.map((n, k) => n + (1 - decay) * (seen.counts[k] - n));
  return { vectors: descend(z, z, book.vectors, 0, rate).vectors, counts, sums: book.sums };
}

// How likely an encoding is to become a new code vector: ∝ squared distance from the nearest one.
export function sampleWeights(z, vectors) {
  const tokens = nearest(z, vectors);
  const error = z.map((point, i) => squared(point, vectors[tokens[i]]));
  const mean = error.reduce((a, b) => a + b, 0) / error.length;
  return error.map((e) => e + 1e-6 * mean + 1e-12);
}

function drawDistinct(weights, count, random) {
  const left = [...weights];
  return Array.from({ length: count }, () => {
    const i = sampleIndex(left, random());
    left[i] = 0;
    return i;
  });
}

function replaceCodes(book, which, rows) {
  const at = (k) => rows[which.indexOf(k)];
  const put = (old) => old.map((row, k) => (which.includes(k) ? [...at(k)] : row));
  const counts = book.counts.map((n, k) => (which.includes(k) ? 1 : n));
  return { vectors: put(book.vectors), counts, sums: put(book.sums) };
}

// Move code vectors that are hardly ever chosen onto encodings.
export function restartDeadCodes(book, z, random, threshold = 0.03) {
  const dead = book.counts.flatMap((n, k) => (n < threshold ? [k] : [])).slice(0, z.length);
  const chosen = drawDistinct(sampleWeights(z, book.vectors), dead.length, random);
  return replaceCodes(book, dead, chosen.map((i) => z[i]));
}

// Code vectors at the centres of encodings, by Lloyd's algorithm, which starts at the encodings `first`.
export function kmeansInit(z, first, rounds, random) {
  let vectors = first.map((i) => [...z[i]]);
  for (let round = 0; round < rounds; round++) {
    const { counts, sums } = countAndSum(z, nearest(z, vectors), vectors);
    const empty = counts.flatMap((n, k) => (n ? [] : [k]));
    const spare = drawDistinct(sampleWeights(z, vectors), empty.length, random);
    vectors = sums.map((m, k) =>
      counts[k] ? m.map((v) => v / counts[k]) : [...z[spare[empty.indexOf(k)]]]);
  }
  return vectors;
}

export function shares(tokens, size) {
  const counts = Array(size).fill(0);
  tokens.forEach((k) => (counts[k] += 1));
  return counts.map((n) => n / tokens.length);
}

// exp of the entropy: the number of equally used codes that would be as hard to predict.
export function perplexity(p) {
  return Math.exp(-p.reduce((sum, q) => sum + (q > 0 ? q * Math.log(q) : 0), 0));
}
