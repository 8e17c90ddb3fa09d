//! When a delivery that failed is tried again: a fixed list of delays, a little jitter, and what the receiver asked for.

use std::time::Duration;

use super::WebhookSettings;

/// The pause after attempt number `attempts` (from 1) failed; `None`: that was the last one.
///
/// `draw` is a random number that spreads receivers which failed together; `asked` is the receiver's `retry-after`.
pub fn pause(
    settings: &WebhookSettings,
    attempts: u64,
    asked: Option<Duration>,
    draw: u64,
) -> Option<Duration> {
    let index = usize::try_from(attempts.checked_sub(1)?).ok()?;
    let delay_ms = *settings.retry_delays_ms.get(index)?;
    // Only later, never earlier: the list says how long a receiver is left alone at the least.
    let spread_ms = delay_ms.saturating_mul(settings.retry_jitter_percent) / 100;
    let jitter_ms = draw % (spread_ms + 1);
    let asked = asked.unwrap_or_default().min(Duration::from_millis(settings.retry_after_ms_max));
    Some(Duration::from_millis(delay_ms.saturating_add(jitter_ms)).max(asked))
}

/// A number for [`pause`], from the operating system.
pub fn draw() -> u64 {
    let mut bytes = [0u8; 8];
    getrandom::fill(&mut bytes).expect("the operating system gives random bytes");
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_schedule_lasts_days_and_ends() {
        let settings = WebhookSettings::default();
        let pauses: Vec<u64> = (1..)
            .map_while(|attempts| pause(&settings, attempts, None, 0))
            .map(|pause| pause.as_secs())
            .collect();
        assert_eq!(pauses, [5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400]);
        assert_eq!(pause(&settings, 0, None, 0), None);
    }

    #[test]
    fn jitter_stays_within_its_part_and_a_receiver_is_heard_within_its_limit() {
        let settings = WebhookSettings {
            retry_delays_ms: vec![1000, u64::MAX],
            retry_jitter_percent: 20,
            retry_after_ms_max: 60_000,
            ..WebhookSettings::default()
        };
        let after = |asked_s: Option<u64>, draw| {
            pause(&settings, 1, asked_s.map(Duration::from_secs), draw).expect("a pause").as_millis()
        };
        assert_eq!((after(None, 0), after(None, 200), after(None, 201)), (1000, 1200, 1000));
        assert!((0..1000).all(|draw| (1000..=1200).contains(&after(None, draw))));
        assert_eq!((after(Some(30), 0), after(Some(3600), 0), after(Some(0), 0)), (30_000, 60_000, 1000));
        assert!(pause(&settings, 2, None, u64::MAX).is_some(), "the longest delay does not overflow");
    }
}
