/// Somebody who does one task: gives the seconds of as many of them as it likes.
pub struct Contender<'a> {
    name: String,
    run: Box<dyn FnMut() -> Result<Vec<f64>, String> + 'a>,
    seconds: Result<Vec<f64>, String>,
}

impl<'a> Contender<'a> {
    /// Not measured yet.
    pub fn new(name: impl Into<String>, run: impl FnMut() -> Result<Vec<f64>, String> + 'a) -> Self {
        Self { name: name.into(), run: Box::new(run), seconds: Ok(Vec::new()) }
    }
}

/// What somebody took.
#[derive(Debug, Clone)]
pub struct Measured {
    /// Who.
    pub name: String,
    /// Median seconds of one task, or why there is none.
    pub seconds: Result<f64, String>,
    /// Fastest and slowest.
    pub range: [f64; 2],
}

/// One task of each to warm up, then all in turn, `rounds` times. Nobody else of them works meanwhile.
pub fn in_turn(mut contenders: Vec<Contender<'_>>, rounds: usize) -> Vec<Measured> {
    for round in 0..=rounds {
        for contender in &mut contenders {
            let Ok(known) = &mut contender.seconds else { continue };
            match (contender.run)() {
                Ok(seconds) if round > 0 => known.extend(seconds),
                Ok(_) => eprintln!("  {}", contender.name),
                Err(error) => contender.seconds = Err(error),
            }
        }
    }
    let measured = |Contender { name, seconds, .. }: Contender<'_>| {
        let seconds = seconds.and_then(|seconds| if seconds.is_empty() { Err("nothing was measured".to_owned()) } else { Ok(seconds) });
        let range = seconds
            .as_ref()
            .map_or([f64::NAN; 2], |all| [all.iter().copied().fold(f64::INFINITY, f64::min), all.iter().copied().fold(0.0, f64::max)]);
        Measured { name, seconds: seconds.map(median), range }
    };
    contenders.into_iter().map(measured).collect()
}

/// The middle one, or the mean of the two in the middle.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        len if len % 2 == 1 => values[middle],
        _ => (values[middle - 1] + values[middle]) / 2.0,
    }
}
