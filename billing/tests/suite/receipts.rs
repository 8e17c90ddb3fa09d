//! Receipts against the books: what was signed when a bill was made is what either database says of it later.

use sluice_billing::{Mismatch, PinnedPrices, Quantities, Receipt, ReceiptKeys, ReceiptSigner};

use crate::support::*;

async fn a_receipt_agrees_with_the_stored_bill() {
    let world = World::new(100_000).await;
    let signer = ReceiptSigner::from_seed(&[7; 32]);
    let keys = ReceiptKeys::new([signer.public().clone()]);
    let mut receipts = Vec::new();
    for (input, cached, output) in [(10, 0, 3), (4, 6, 0), (0, 10, 4)] {
        let hold = world.billing.admit(request(10, 4)).await.unwrap();
        let prices: PinnedPrices = hold.prices();
        let bill = hold.settle(outcome(input, cached, output)).await.unwrap();
        let counted = Quantities {
            input_tokens: input,
            cached_input_tokens: cached,
            output_tokens: output,
            ..Quantities::default()
        };
        assert_eq!(prices.cost_of(counted, 4), Some(bill.cost), "the cost so far ends as the bill");
        receipts.push(keys.verify(&signer.sign(&bill)).expect("our own receipt"));
        assert_eq!(receipts.last(), Some(&Receipt::of(&bill)));
    }
    let books = world.billing.books();
    assert_eq!(books.billed(receipts[0].request_id).await.unwrap(), None, "it is still on its way");
    world.posted().await;
    for receipt in &receipts {
        let billed = books.billed(receipt.request_id).await.unwrap().expect("a bill");
        assert_eq!(billed, *receipt);
        receipt.check_bill(&billed).unwrap();
        receipt.check_cost(&books.price_book(&receipt.price_book).await.unwrap()).unwrap();
    }
    let [first, second, _] = &receipts[..] else { panic!("three receipts") };
    let other = books.billed(second.request_id).await.unwrap().expect("a bill");
    assert!(matches!(first.check_bill(&other), Err(Mismatch::Bill { field, .. }) if field == "request_id"));
}

/// More than was covered is in no bill, and so in no cost so far.
async fn the_cost_so_far_is_never_above_the_hold() {
    let world = World::new(100_000).await;
    let hold = world.billing.admit(request(10, 4)).await.unwrap();
    let prices = hold.prices();
    let counted =
        Quantities { input_tokens: 12, cached_input_tokens: 1, output_tokens: 9, ..Quantities::default() };
    let so_far = prices.cost_of(counted, hold.granted_output_tokens());
    let bill = hold.settle(outcome(12, 1, 9)).await.unwrap();
    assert_eq!(so_far, Some(bill.cost));
    assert_eq!(bill.cost, pico(9 * INPUT + CACHED + 4 * OUTPUT));
}

on_both!(a_receipt_agrees_with_the_stored_bill, the_cost_so_far_is_never_above_the_hold);
