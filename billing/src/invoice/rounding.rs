//! Rounding to cents, once for a whole invoice, by largest remainder.
//!
//! The total is the exact sum rounded half up. Each amount is rounded down, and the cents that the total has more go,
//! one each, to the amounts that lost most; of equal losses the earlier first.
//!
//! ```text
//! exact     0.333  0.333  0.334   sum 1.000
//! rounded   0.33   0.33   0.34    sum 1.00
//! ```

/// Rounds `exact` to whole multiples of `unit`, returned in units. Their sum is the rounded sum of `exact`, and each is
/// less than one unit away from its amount. `unit` is positive.
pub(crate) fn apportion(exact: &[i128], unit: i128) -> Vec<i128> {
    assert!(unit > 0, "amounts are rounded to a positive unit");
    let sum: i128 = exact.iter().sum();
    let total = (2 * sum + unit).div_euclid(2 * unit);
    let mut rounded: Vec<i128> = exact.iter().map(|amount| amount.div_euclid(unit)).collect();
    let missing = total - rounded.iter().sum::<i128>();
    let mut by_loss: Vec<usize> = (0..exact.len()).collect();
    by_loss.sort_by_key(|&index| std::cmp::Reverse(exact[index].rem_euclid(unit)));
    let missing = usize::try_from(missing).expect("rounding down never yields more than the total");
    for &index in &by_loss[..missing] {
        rounded[index] += 1;
    }
    rounded
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn cents_go_to_the_largest_remainders() {
        let check = |exact: &[i128], expect: &[i128]| assert_eq!(apportion(exact, 100), expect, "{exact:?}");
        check(&[], &[]);
        check(&[50], &[1]);
        check(&[49], &[0]);
        check(&[-50], &[0]);
        check(&[-51], &[-1]);
        check(&[33, 33, 34], &[0, 0, 1]);
        check(&[50, 50, 50], &[1, 1, 0]);
        check(&[1_000, 250, -250], &[10, 3, -3]);
        check(&[1_050, -1_050], &[11, -11]);
    }

    proptest! {
        #[test]
        fn the_sum_is_kept_and_no_amount_moves_by_a_unit(
            exact in prop::collection::vec(-1_000_000_i128..1_000_000, 0..40),
            unit in 1_i128..2_000,
        ) {
            let rounded = apportion(&exact, unit);
            let (sum, total): (i128, i128) = (exact.iter().sum(), rounded.iter().sum());
            // Half up: the total is within half a unit, and at exactly half above.
            prop_assert!(2 * (total * unit - sum) <= unit && 2 * (total * unit - sum) > -unit);
            for (exact, rounded) in exact.iter().zip(&rounded) {
                prop_assert!((rounded * unit - exact).abs() < unit);
            }
            prop_assert_eq!(&apportion(&exact, unit), &rounded);
        }

        #[test]
        fn whole_units_stay_what_they_are(units in prop::collection::vec(-1_000_i128..1_000, 0..20)) {
            let exact: Vec<i128> = units.iter().map(|unit| unit * 7).collect();
            prop_assert_eq!(apportion(&exact, 7), units);
        }

        #[test]
        fn an_amount_that_lost_more_never_gets_less(
            exact in prop::collection::vec(0_i128..1_000, 1..20),
        ) {
            let rounded = apportion(&exact, 100);
            let up = |index: usize| rounded[index] > exact[index] / 100;
            for left in 0..exact.len() {
                for right in 0..exact.len() {
                    let (lost, other) = (exact[left] % 100, exact[right] % 100);
                    let first = lost > other || (lost == other && left < right);
                    prop_assert!(!(first && up(right) && !up(left)));
                }
            }
        }
    }
}
