// A quiz: every choice is answered at once, the wrong ones with the reason why they are wrong.

import { button, make, shell, widget } from "./shared.js";

const LETTERS = "ABCDEFGH";

// *emphasis* and `code` as parts: [["text", "a "], ["em", "b"], …]. No other marks are known.
export function parts(text) {
  const found = text.split(/(\*[^*]+\*|`[^`]+`)/).filter((part) => part !== "");
  return found.map((part) => {
    if (part.length > 2 && part[0] === "*") return ["em", part.slice(1, -1)];
    if (part.length > 2 && part[0] === "`") return ["code", part.slice(1, -1)];
    return ["text", part];
  });
}

// How many questions were answered, how many of them at the first try.
export function score(tries, questions) {
  const done = tries.filter((list, i) => list.includes(questions[i].right)).length;
  const first = tries.filter((list, i) => list[0] === questions[i].right).length;
  return { done, first };
}

const rich = (text) =>
  parts(text).map(([kind, part]) => (kind === "text" ? part : make(kind, {}, part)));

function draw(model, el) {
  const questions = model.get("questions"); // [{ ask, right, choices: [[text, reason], …] }]
  let tries = questions.map(() => []);
  const frame = shell(el, model.get("title"), () => {
    tries = questions.map(() => []);
    fill();
    say("");
  });

  function fill() {
    frame.body.replaceChildren(...questions.map((question, q) => {
      const box = make("fieldset", { class: "t2i-question" });
      box.append(make("legend", {}, `${q + 1}. `, ...rich(question.ask)));
      const buttons = question.choices.map(([text], c) => {
        const node = button("", () => answer(q, c, node));
        node.append(`${LETTERS[c]}. `, ...rich(text));
        node.className = "t2i-answer";
        node.setAttribute("aria-pressed", "false");
        return node;
      });
      box.append(make("div", {}, ...buttons));
      box.addEventListener("keydown", (event) => {
        const c = LETTERS.indexOf(event.key.toUpperCase());
        if (event.key.length > 1 || c < 0 || c >= buttons.length) return;
        if (event.ctrlKey || event.metaKey || event.altKey) return;
        event.preventDefault();
        event.stopPropagation(); // in a notebook, A and B make new cells
        buttons[c].focus();
        answer(q, c, buttons[c]);
      });
      return box;
    }));
  }

  function answer(q, c, node) {
    const [, reason] = questions[q].choices[c];
    const right = c === questions[q].right;
    const word = right ? "Right." : "Not so.";
    if (!tries[q].includes(c)) {
      tries[q].push(c);
      node.classList.add(right ? "right" : "wrong");
      node.setAttribute("aria-pressed", "true");
      const verdict = make("strong", { class: right ? "right" : "wrong" }, word);
      node.after(make("p", { class: "t2i-reason" }, verdict, " ", ...rich(reason)));
    }
    say(`Question ${q + 1}, ${LETTERS[c]}: ${word} ${parts(reason).map(([, part]) => part).join("")} `);
  }

  function say(before) {
    const { done, first } = score(tries, questions);
    const unit = questions.length === 1 ? "question" : "questions";
    frame.say(`${before}${done} of ${questions.length} ${unit} answered, ${first} at the first try.`);
  }
  frame.controls.append(make("p", { class: "t2i-hint" },
    "Keyboard: Tab and Enter, or within a question the letters themselves."));
  fill();
  say("");
}

export default widget(draw);
