//! Money from outside: real files, the public face, and the database that an auditor would open.

mod audit;
mod budgets;
mod crash;
mod credits;
mod exports;
mod history;
mod invoices;
mod lifecycle;
mod notices;
mod prices;
mod receipts;
mod support;
mod upgrade;
mod writes;
