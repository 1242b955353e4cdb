//! A fast walk over the fields of a JSON object, for who wants a few of them and steps over the rest.
//!
//! It takes what `serde_json` takes where it ignores a value: the grammar is checked, the texts' UTF-8 is not. What is
//! out of the ordinary it leaves to `serde_json`, whose words every refusal has: `None` says no more than that.

use memchr::memchr2;

/// Most arrays and objects in one another, below the object itself; a bit each tells which is which.
const DEPTH_MAX: u32 = u64::BITS;

/// Hands over each field of the object that the body is: its name, which is ASCII, and its value as it is written.
/// Fields may come twice.
///
/// Returns nothing where `field` does, where a name is escaped or no ASCII, where values nest deeper than 64, and where
/// the body is not one JSON object.
pub(crate) fn fields<'a>(body: &'a [u8], mut field: impl FnMut(&'a [u8], &'a [u8]) -> Option<()>) -> Option<()> {
    let mut walk = Walk { body, at: 0 };
    if walk.next()? != b'{' {
        return None;
    }
    if walk.peek()? == b'}' {
        walk.at += 1;
    } else {
        loop {
            let name = walk.key()?;
            if name.iter().any(|byte| *byte == b'\\' || !byte.is_ascii()) {
                return None;
            }
            walk.peek()?;
            let begin = walk.at;
            walk.value()?;
            field(name, body.get(begin..walk.at)?)?;
            match walk.next()? {
                b',' => {}
                b'}' => break,
                _ => return None,
            }
        }
    }
    walk.peek().is_none().then_some(())
}

/// Bytes of a text that are looked at one by one: most texts are short, and to look at many at once has a price.
const NEAR: u32 = 16;

/// Returns the least byte, which tells of all whether one is a control character; found so, it is many at a time.
fn least(bytes: &[u8]) -> u8 {
    bytes.iter().fold(u8::MAX, |least, byte| least.min(*byte))
}

struct Walk<'a> {
    body: &'a [u8],
    at: usize,
}

impl<'a> Walk<'a> {
    /// Returns the next byte that is no white space, and stays before it.
    fn peek(&mut self) -> Option<u8> {
        loop {
            match *self.body.get(self.at)? {
                b' ' | b'\n' | b'\t' | b'\r' => self.at += 1,
                byte => return Some(byte),
            }
        }
    }

    /// Returns the next byte that is no white space, and steps over it.
    fn next(&mut self) -> Option<u8> {
        let byte = self.peek()?;
        self.at += 1;
        Some(byte)
    }

    fn value(&mut self) -> Option<()> {
        let (mut objects, mut depth) = (0u64, 0u32);
        loop {
            match self.peek()? {
                open @ (b'{' | b'[') => {
                    self.at += 1;
                    let object = open == b'{';
                    if self.peek()? == if object { b'}' } else { b']' } {
                        self.at += 1;
                    } else {
                        if depth == DEPTH_MAX {
                            return None;
                        }
                        depth += 1;
                        objects = objects << 1 | u64::from(object);
                        if object {
                            self.key()?;
                        }
                        continue;
                    }
                }
                _ => self.scalar()?,
            }
            // A value has ended, and with it maybe those that hold it.
            while depth > 0 {
                let object = objects & 1 == 1;
                match self.next()? {
                    b',' if object => {
                        self.key()?;
                        break;
                    }
                    b',' => break,
                    b'}' if object => {}
                    b']' if !object => {}
                    _ => return None,
                }
                depth -= 1;
                objects >>= 1;
            }
            if depth == 0 {
                return Some(());
            }
        }
    }

    /// Steps over a key and its colon, and returns what is between the quotes.
    fn key(&mut self) -> Option<&'a [u8]> {
        if self.next()? != b'"' {
            return None;
        }
        let begin = self.at;
        self.text()?;
        let key = self.body.get(begin..self.at - 1)?;
        (self.next()? == b':').then_some(key)
    }

    fn scalar(&mut self) -> Option<()> {
        let rest = self.body.get(self.at..)?;
        let word: &[u8] = match rest.first()? {
            b'"' => {
                self.at += 1;
                return self.text();
            }
            b'-' | b'0'..=b'9' => return self.number(),
            b'n' => b"null",
            b't' => b"true",
            b'f' => b"false",
            _ => return None,
        };
        self.at += word.len();
        rest.starts_with(word).then_some(())
    }

    /// Steps over a text whose opening quote is behind.
    fn text(&mut self) -> Option<()> {
        let mut near = NEAR;
        loop {
            match *self.body.get(self.at)? {
                b'"' => {
                    self.at += 1;
                    return Some(());
                }
                b'\\' => {
                    self.at += 1;
                    self.escape()?;
                    near = NEAR;
                }
                ..b' ' => return None,
                _ if near > 0 => {
                    self.at += 1;
                    near -= 1;
                }
                _ => {
                    let rest = self.body.get(self.at..)?;
                    let plain = rest.get(..memchr2(b'"', b'\\', rest)?)?;
                    if least(plain) < b' ' {
                        return None;
                    }
                    self.at += plain.len();
                }
            }
        }
    }

    /// Steps over what follows a backslash.
    fn escape(&mut self) -> Option<()> {
        let length = match *self.body.get(self.at)? {
            b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => 1,
            b'u' if self.body.get(self.at + 1..self.at + 5)?.iter().all(u8::is_ascii_hexdigit) => 5,
            _ => return None,
        };
        self.at += length;
        Some(())
    }

    fn number(&mut self) -> Option<()> {
        if self.body.get(self.at) == Some(&b'-') {
            self.at += 1;
        }
        let zero = self.body.get(self.at) == Some(&b'0');
        if self.digits()? > 1 && zero {
            return None;
        }
        if self.body.get(self.at) == Some(&b'.') {
            self.at += 1;
            self.digits()?;
        }
        if let Some(b'e' | b'E') = self.body.get(self.at) {
            self.at += 1;
            if let Some(b'+' | b'-') = self.body.get(self.at) {
                self.at += 1;
            }
            self.digits()?;
        }
        Some(())
    }

    /// Returns how many there are, if any.
    fn digits(&mut self) -> Option<usize> {
        let rest = self.body.get(self.at..)?;
        let count = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        self.at += count;
        (count > 0).then_some(count)
    }
}
