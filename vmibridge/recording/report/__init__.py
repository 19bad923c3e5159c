"""A recording as one HTML page that needs nothing else.

| module | holds |
|---|---|
| `statistics` | counts and latencies of all traps, by streaming |
| `rows` | the traps that the page shows, in columns |
| `collect` | one pass over a recording |
| `page` | the page, from `page.html`, `page.css` and the scripts |

Rules:

- Everything that a recording says is untrusted. It goes into the page as compressed data in
  base64, and from there into text nodes: none of it is ever markup, style or script.
- The page loads nothing and runs only its own scripts, which its Content-Security-Policy
  names by their hashes.
- What is held does not grow with the recording beyond the traps that are shown.
"""
