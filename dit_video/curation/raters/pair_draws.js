"use strict";
// Pairs that a rater judges, and their order: a function of a text alone, the id of the page with the rater's name.
const pairDraws = (() => {
  // A generator of numbers in 0..1 from a text: FNV-1a for the state, steps of a Weyl sequence, mixed by multiplication.
  const makeGenerator = (text) => {
    let state = 0x811c9dc5;
    for (const byte of new TextEncoder().encode(text)) state = Math.imul(state ^ byte, 0x01000193);
    return () => {
      state = (state + 0x9e3779b9) | 0;
      let mixed = Math.imul(state ^ (state >>> 16), 0x85ebca6b);
      mixed = Math.imul(mixed ^ (mixed >>> 13), 0xc2b2ae35);
      return ((mixed ^ (mixed >>> 16)) >>> 0) / 2 ** 32;
    };
  };
  const shuffle = (values, generate) => {
    const shuffled = [...values];
    for (let last = shuffled.length - 1; last > 0; last--) {
      const other = Math.floor(generate() * (last + 1));
      [shuffled[last], shuffled[other]] = [shuffled[other], shuffled[last]];
    }
    return shuffled;
  };
  // Systematic sampling: every pair is as likely as any other, and each stratum has its share within one pair.
  const drawPairs = ({ count, strata }, generate) => {
    const pairs = shuffle(strata.map((stratum) => shuffle(stratum, generate)), generate).flat();
    const step = pairs.length / count, start = generate() * step;
    return Array.from({ length: count }, (_, number) => pairs[Math.floor(start + number * step)]);
  };
  // The numbers of the rater's pairs in their order, each with true if its first side is on the left.
  const draw = (draws, text) => {
    const generate = makeGenerator(text);
    const numbers = shuffle(draws.flatMap((each) => drawPairs(each, generate)), generate);
    return numbers.map((number) => ({ number, isFirstLeft: generate() < 0.5 }));
  };
  return { draw };
})();
