// Creates an account, grants and charges credits, and prints the history: go run . ACCOUNT_ID
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	daybook "example.com/shop/gen/daybook/v1"
)

func main() {
	if err := run(os.Args[1]); err != nil {
		log.Fatal(err)
	}
}

func run(accountID string) error {
	connection, err := grpc.NewClient(
		setting("DAYBOOK_ADDRESS", "127.0.0.1:50051"),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
	)
	if err != nil {
		return err
	}
	defer connection.Close()
	ledger := daybook.NewLedgerClient(connection)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	ctx = metadata.AppendToOutgoingContext(
		ctx, "authorization", "Bearer "+setting("DAYBOOK_KEY", "demo-dreadnode.public"))

	account, err := ledger.CreateAccount(ctx, &daybook.CreateAccountRequest{
		AccountId: accountID,
		Account:   &daybook.Account{Kind: daybook.Account_USER},
		RequestId: accountID + "-1",
	})
	if err != nil {
		return err
	}
	for number, transaction := range []*daybook.Transaction{
		{Kind: daybook.Transaction_GRANT, Category: "purchase", Amount: "20"},
		{Kind: daybook.Transaction_CHARGE, Category: "inference", Amount: "-0.25"},
	} {
		if _, err := ledger.CreateTransaction(ctx, &daybook.CreateTransactionRequest{
			Parent:      account.Name,
			Transaction: transaction,
			RequestId:   fmt.Sprintf("%s-%d", accountID, number+2),
		}); err != nil {
			return err
		}
	}
	request := &daybook.ListTransactionsRequest{Parent: account.Name}
	for {
		page, err := ledger.ListTransactions(ctx, request)
		if err != nil {
			return err
		}
		for _, each := range page.Transactions {
			fmt.Println(each.Kind, each.Amount, each.BalanceAfter)
		}
		if page.NextPageToken == "" {
			return nil
		}
		request.PageToken = page.NextPageToken
	}
}

func setting(name, byDefault string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	return byDefault
}
