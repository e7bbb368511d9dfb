/// A value that processes send to each other, exactly: numbers keep their bits.
pub trait Portable: Sized {
    /// Appends the value to `out`.
    fn put(&self, out: &mut Vec<u8>);

    /// Takes the value from the front of `from`; `None` if that is not such a value.
    fn take(from: &mut &[u8]) -> Option<Self>;

    /// Appends values one after the other.
    fn put_all(values: &[Self], out: &mut Vec<u8>) {
        values.iter().for_each(|value| value.put(out));
    }

    /// Takes `count` values.
    fn take_all(count: usize, from: &mut &[u8]) -> Option<Vec<Self>> {
        // A count that no message could hold must not reserve memory.
        let mut values = Vec::with_capacity(count.min(from.len()));
        for _ in 0..count {
            values.push(Self::take(from)?);
        }
        Some(values)
    }
}

fn split<'a>(from: &mut &'a [u8], len: usize) -> Option<&'a [u8]> {
    let (head, tail) = from.split_at_checked(len)?;
    *from = tail;
    Some(head)
}

macro_rules! numbers {
    ($($number:ty),*) => {$(
        impl Portable for $number {
            fn put(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }

            fn take(from: &mut &[u8]) -> Option<Self> {
                Some(Self::from_le_bytes(split(from, size_of::<Self>())?.try_into().ok()?))
            }

            fn take_all(count: usize, from: &mut &[u8]) -> Option<Vec<Self>> {
                let bytes = split(from, count.checked_mul(size_of::<Self>())?)?;
                let number = |bytes: &[u8]| Self::from_le_bytes(bytes.try_into().expect("chunks have the size of the number"));
                Some(bytes.chunks_exact(size_of::<Self>()).map(number).collect())
            }
        }
    )*};
}

numbers!(u8, u32, i32, u64, f32, f64);

impl Portable for usize {
    fn put(&self, out: &mut Vec<u8>) {
        (*self as u64).put(out);
    }

    fn take(from: &mut &[u8]) -> Option<Self> {
        u64::take(from)?.try_into().ok()
    }
}

impl Portable for bool {
    fn put(&self, out: &mut Vec<u8>) {
        out.push(u8::from(*self));
    }

    fn take(from: &mut &[u8]) -> Option<Self> {
        Some(u8::take(from)? != 0)
    }
}

impl Portable for () {
    fn put(&self, _: &mut Vec<u8>) {}

    fn take(_: &mut &[u8]) -> Option<Self> {
        Some(())
    }
}

impl Portable for String {
    fn put(&self, out: &mut Vec<u8>) {
        self.len().put(out);
        out.extend_from_slice(self.as_bytes());
    }

    fn take(from: &mut &[u8]) -> Option<Self> {
        Self::from_utf8(Vec::take(from)?).ok()
    }
}

impl<T: Portable> Portable for Vec<T> {
    fn put(&self, out: &mut Vec<u8>) {
        self.len().put(out);
        T::put_all(self, out);
    }

    fn take(from: &mut &[u8]) -> Option<Self> {
        T::take_all(usize::take(from)?, from)
    }
}

impl<T: Portable> Portable for Option<T> {
    fn put(&self, out: &mut Vec<u8>) {
        self.is_some().put(out);
        if let Some(value) = self {
            value.put(out);
        }
    }

    fn take(from: &mut &[u8]) -> Option<Self> {
        if bool::take(from)? { T::take(from).map(Some) } else { Some(None) }
    }
}

impl<A: Portable, B: Portable> Portable for (A, B) {
    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
        self.1.put(out);
    }

    fn take(from: &mut &[u8]) -> Option<Self> {
        Some((A::take(from)?, B::take(from)?))
    }
}

impl<A: Portable, B: Portable, C: Portable> Portable for (A, B, C) {
    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
        self.1.put(out);
        self.2.put(out);
    }

    fn take(from: &mut &[u8]) -> Option<Self> {
        Some((A::take(from)?, B::take(from)?, C::take(from)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_keep_their_bits() {
        let value = (vec![f32::NAN, -0.0, 1.5], (Some(vec!["ä".to_owned()]), None::<f64>, true));
        let mut bytes = Vec::new();
        value.put(&mut bytes);
        let mut rest = &bytes[..];
        let back: (Vec<f32>, (Option<Vec<String>>, Option<f64>, bool)) = Portable::take(&mut rest).unwrap();
        assert!(rest.is_empty());
        assert_eq!(back.0.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), value.0.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
        assert_eq!(back.1, value.1);
    }

    #[test]
    fn what_is_cut_short_is_no_value() {
        let mut bytes = Vec::new();
        vec![1.0_f32, 2.0].put(&mut bytes);
        for len in 0..bytes.len() {
            assert_eq!(Vec::<f32>::take(&mut &bytes[..len]), None, "{len} bytes");
        }
        // A length that cannot be.
        let endless = u64::MAX.to_le_bytes();
        assert_eq!(Vec::<f64>::take(&mut &endless[..]), None);
        assert_eq!(Vec::<String>::take(&mut &endless[..]), None);
    }
}
