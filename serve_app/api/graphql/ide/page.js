'use strict';

(() => {
  const WELCOME = `# Queries and mutations go by HTTP, subscriptions by graphql-transport-ws.
# The documentation is behind the book at the left; Ctrl-Enter runs what stands here.

{
  availableModels {
    items { name provider state capabilities reason }
    providers { name status error modelCount }
  }
}
`;
  const here = window.location.href.split(/[?#]/)[0];
  const fetcher = GraphiQL.createFetcher({ url: here, subscriptionUrl: here.replace(/^http/, 'ws') });
  const root = ReactDOM.createRoot(document.getElementById('graphiql'));
  root.render(React.createElement(GraphiQL, { fetcher, defaultQuery: WELCOME }));
})();
