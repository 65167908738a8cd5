// Numbers as text. What was not measured is a dash, whoever asks.

export const DASH = "–";

function missing(value) {
  return value === null || value === undefined || Number.isNaN(value);
}

/** A number of about `digits` significant digits. */
export function number(value, digits = 3) {
  if (missing(value)) return DASH;
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(Math.max(digits - 2, 1)).replace("-", "−").replace("e+", "e");
  const places = Math.max(0, Math.min(6, digits - 1 - Math.floor(Math.log10(size))));
  return value.toFixed(places).replace("-", "−");
}

/** A whole number with its thousands apart. */
export function whole(value) {
  return missing(value) ? DASH : Math.round(value).toLocaleString("en-US").replace("-", "−");
}

/** A share 0..1 in percent. */
export function percent(value, places = 1) {
  return missing(value) ? DASH : `${(100 * value).toFixed(places)}%`;
}

/** Bytes in the unit that suits them. */
export function bytes(value) {
  if (missing(value)) return DASH;
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${unit === 0 ? value : value.toPrecision(3)} ${units[unit]}`;
}

/** A count in thousands, millions and so on. */
export function count(value) {
  if (missing(value)) return DASH;
  if (value < 10000) return whole(value);
  const units = ["", "k", "M", "G", "T", "P"];
  const unit = Math.min(units.length - 1, Math.floor(Math.log10(value) / 3));
  return `${(value / 1000 ** unit).toPrecision(3)} ${units[unit]}`;
}

/** With its unit, or a dash. */
export function unit(value, name, digits = 3) {
  return missing(value) ? DASH : `${number(value, digits)} ${name}`;
}

/** The quotient, or null where it cannot be had. */
export function ratio(above, below) {
  return missing(above) || missing(below) || below === 0 ? null : above / below;
}

/** Text of a shape: 1 × s0 × 64. */
export function shape(dimensions) {
  return dimensions && dimensions.length ? dimensions.join(" × ") : DASH;
}

/** One word or its plural. */
export function plural(n, word) {
  return `${whole(n)} ${word}${n === 1 ? "" : "s"}`;
}
