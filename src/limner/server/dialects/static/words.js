// Which words a prompt has that a model was not trained on: the rule of `limner.mentions.unknown_words`.

/** The words of a prompt that are not among those known, each once. A word is a run of letters, and case counts. */
export function unknownWords(prompt, known) {
  return [...new Set(prompt.match(/\p{L}+/gu) ?? [])].filter((word) => !known.has(word));
}
