// Creates an account, grants and charges credits, and prints the history: node charge.js ACCOUNT_ID
import { createClient } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { Account_Kind } from "./client/daybook/v1/account_pb.js";
import { Ledger } from "./client/daybook/v1/ledger_service_pb.js";
import { Transaction_Kind } from "./client/daybook/v1/transaction_pb.js";

const accountId = process.argv[2];
const baseUrl = `http://${process.env.DAYBOOK_ADDRESS ?? "127.0.0.1:50051"}`;
const authorization = `Bearer ${process.env.DAYBOOK_KEY ?? "demo-dreadnode.public"}`;
const ledger = createClient(Ledger, createGrpcTransport({ baseUrl, defaultTimeoutMs: 30_000 }));
const options = { headers: { authorization } };

const account = { kind: Account_Kind.USER };
const { name: parent } = await ledger.createAccount({ accountId, account, requestId: `${accountId}-1` }, options);
const grant = { kind: Transaction_Kind.GRANT, category: "purchase", amount: "20" };
await ledger.createTransaction({ parent, transaction: grant, requestId: `${accountId}-2` }, options);
const charge = { kind: Transaction_Kind.CHARGE, category: "inference", amount: "-0.25" };
await ledger.createTransaction({ parent, transaction: charge, requestId: `${accountId}-3` }, options);
let pageToken = "";
do {
  const page = await ledger.listTransactions({ parent, pageToken }, options);
  for (const each of page.transactions) {
    console.log(Transaction_Kind[each.kind], each.amount, each.balanceAfter);
  }
  pageToken = page.nextPageToken;
} while (pageToken !== "");
